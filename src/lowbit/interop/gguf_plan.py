"""Which GGUF type each matrix takes, decided before anything is written.

A stored matrix takes the wanted type if that holds it exactly; without a wanted one, where its blocks do not
divide a row, and for embedding and head it takes the smallest type that does. What is left is refused, or
rounded where the user allows it. Floats are rounded to the wanted type, as asked. Types whose blocks do not
divide a row give way to smaller blocks, and embedding and head, which every token reads, keep more bits; both
as llama.cpp does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.errors import RequestError, UnsupportedError
from lowbit.interop.gguf_exact import QUANTIZED, exact_rows
from lowbit.interop.gguf_fit import BY_NAME, FITTED, FLOATS, ROUNDED
from lowbit.interop.parts import Planned
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.tensors import EMBEDDING, HEAD
from lowbit.packed import FloatTerm, PackedMatrix

WRITABLE = (*ROUNDED, *FITTED, *FLOATS)  # what floats can become
# Where blocks of 256 do not divide a row: a type of blocks of 32 with at least as many bits.
SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0"}
_FEW_BITS = ("Q4_0", "Q4_1", "Q5_0", "Q4_K", "TQ1_0", "TQ2_0", "MXFP4")  # embedding and head: Q6_K instead
_FLOAT_DTYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
# ggml's numbers of the kinds of files, by the type of most matrices.
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
}
FILE_TYPES |= {"Q6_K": 18, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38}


@dataclass(frozen=True, eq=False)
class Choice:
    """One tensor of the file: the type it takes.

    exact: stored codes and scales are copied; else floats are rounded
    lost: rounded although it was stored in few bits
    why: what was wanted instead, and why not; None: it is as wanted
    """

    planned: Planned
    stored: str
    type: str
    exact: bool
    lost: bool = False
    why: str | None = None

    @property
    def name(self) -> str:
        """Canonical where it is one matrix."""
        return self.planned.parts[0].name if len(self.planned.parts) == 1 else self.planned.name


def parse_type(text: str | None) -> str | None:
    """ "q4_k" -> "Q4_K"; None (as stored) stays. Raises RequestError for what is not written."""
    if text is None or text.upper() in WRITABLE:
        return None if text is None else text.upper()
    raise RequestError(
        f"export: gguf:{text} is not a type that lowbit writes; choose "
        f"{', '.join(name.lower() for name in WRITABLE)}, or gguf alone for what is stored"
    )


def choose(checkpoint: Checkpoint, planned: Planned, wanted: str | None, embedding: str | None) -> Choice:
    """The type of a tensor of matrices. Where only rounding brings it into GGUF `lost` is set, whether or not
    that is allowed.

    wanted: a type of WRITABLE, None: as stored; embedding: the same for embedding and head, None: see above
    """
    names = [part.name for part in planned.parts]
    stored = ", ".join(dict.fromkeys(checkpoint.dtype(name) for name in names))
    around = names[0] in (EMBEDDING, HEAD)
    asked = (embedding or wanted) if around else wanted
    spare = around and embedding is None
    columns = planned.shape[-1]
    float_type = _FLOAT_DTYPES.get(stored)
    if float_type is None and len(names) == 1:
        float_type = _float_type(checkpoint.matrix(names[0]))
    if float_type is not None:
        target = asked or float_type
        target, why = _dividing("Q6_K" if spare and target in _FEW_BITS else target, columns)
        return Choice(planned, stored, target, target == float_type, why=why)

    tries = [asked] if asked else []
    if spare or asked is None or columns % BY_NAME[asked].block:
        tries += QUANTIZED
    for kind in tries:
        if columns % BY_NAME[kind].block == 0 and _holds(checkpoint, names, kind):
            why = None if kind == asked or not asked else f"{asked} does not hold {stored} exactly"
            return Choice(planned, stored, kind, True, why=why)
    if asked is None:
        raise UnsupportedError(
            f"export to GGUF: no type holds {names[0]} ({stored}) exactly; name one: gguf:q6_k --lossy"
        )
    target, why = _dividing("Q6_K" if spare and asked in _FEW_BITS else asked, columns)
    return Choice(planned, stored, target, False, True, why)


def _holds(checkpoint: Checkpoint, names: Sequence[str], kind: str) -> bool:
    return all(exact_rows(checkpoint.matrix(name), kind) is not None for name in names)


def _float_type(matrix: PackedMatrix) -> str | None:
    term = matrix.terms[0]
    return _FLOAT_DTYPES[term.type] if len(matrix.terms) == 1 and isinstance(term, FloatTerm) else None


def _dividing(target: str, columns: int) -> tuple[str, str | None]:
    """The type, or the next one whose blocks divide a row, and why."""
    first = target
    while columns % BY_NAME[target].block:
        target = SMALLER_BLOCKS.get(target, "F16")
    why = (
        None if target == first else f"rows of {columns} are no multiple of {BY_NAME[first].block} ({first})"
    )
    return target, why
