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


@dataclass(frozen=True)
class Choice:
    """One matrix: the type it takes.

    exact: stored codes and scales are copied; else floats are rounded
    lost: rounded although it was stored in few bits
    why: what was wanted instead, and why not; None: it is as wanted
    """

    name: str
    shape: tuple[int, int]
    stored: str
    type: str
    exact: bool
    lost: bool = False
    why: str | None = None


def parse_type(text: str | None) -> str | None:
    """ "q4_k" -> "Q4_K"; None (as stored) stays. Raises RequestError for what is not written."""
    if text is None or text.upper() in WRITABLE:
        return None if text is None else text.upper()
    raise RequestError(
        f"export: gguf:{text} is not a type that lowbit writes; choose "
        f"{', '.join(name.lower() for name in WRITABLE)}, or gguf alone for what is stored"
    )


def plan(
    checkpoint: Checkpoint, names: Sequence[str], wanted: str | None, embedding: str | None, lossy: bool
) -> list[Choice]:
    """A Choice for each matrix in `names`. Those that only rounding brings into GGUF have `lost` set, whether
    or not that is allowed; `lossy` says how they are then stored.

    wanted: a type of WRITABLE, None: as stored; embedding: the same for embedding and head, None: see above
    """
    return [_choose(checkpoint, name, wanted, embedding, lossy) for name in names]


def _choose(
    checkpoint: Checkpoint, name: str, wanted: str | None, embedding: str | None, lossy: bool
) -> Choice:
    rows, columns = checkpoint.shape(name)
    stored = checkpoint.dtype(name)
    around = name in (EMBEDDING, HEAD)
    asked = (embedding or wanted) if around else wanted
    float_type = _FLOAT_DTYPES.get(stored)
    if float_type is None:
        matrix = checkpoint.matrix(name)
        float_type = _float_type(matrix)
    if float_type is not None:
        target = asked or float_type
        if around and embedding is None and target in _FEW_BITS:
            target = "Q6_K"
        target, why = _dividing(target, columns)
        return Choice(name, (rows, columns), stored, target, target == float_type, why=why)
    return _choose_coded(matrix, name, stored, asked, around and embedding is None)


def _choose_coded(matrix: PackedMatrix, name: str, stored: str, asked: str | None, spare: bool) -> Choice:
    """For a matrix of codes. spare: embedding or head, whose type nobody named."""
    columns = matrix.in_features
    tries = [asked] if asked else []
    if spare or asked is None or columns % BY_NAME[asked].block:
        tries += QUANTIZED
    for kind in tries:
        if columns % BY_NAME[kind].block == 0 and exact_rows(matrix, kind) is not None:
            why = None if kind == asked or not asked else f"{asked} does not hold {stored} exactly"
            return Choice(name, matrix.shape, stored, kind, True, why=why)
    if asked is None:
        raise UnsupportedError(
            f"export to GGUF: no type holds {name} ({stored}) exactly; name one: gguf:q6_k --lossy"
        )
    target = "Q6_K" if spare and asked in _FEW_BITS else asked
    target, why = _dividing(target, columns)
    return Choice(name, matrix.shape, stored, target, False, True, why)


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
