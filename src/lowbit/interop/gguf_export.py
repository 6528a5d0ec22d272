"""A model into a GGUF file: metadata, tokenizer and tensors, one slab of rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError
from lowbit.interop.gguf_exact import Rows, exact_rows
from lowbit.interop.gguf_fit import BY_NAME, fitted
from lowbit.interop.gguf_metadata import architecture, copied, description, rope_vectors
from lowbit.interop.gguf_plan import FILE_TYPES, Choice, choose, parse_type
from lowbit.interop.gguf_vocabulary import vocabulary
from lowbit.interop.gguf_writer import Entry, GGUFWriter
from lowbit.interop.loss import Loss, refuse
from lowbit.interop.parts import Planned, planned_tensors
from lowbit.interop.slabs import decoded, rows_of, slabs
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.gguf_checkpoint import GGUFCheckpoint
from lowbit.model.gguf_names import Architecture, is_shifted_norm
from lowbit.model.gguf_types import decode
from lowbit.packed import PackedMatrix

Progress = Callable[[float, float, str], None]
_F32 = BY_NAME["F32"].number


def export_gguf(
    checkpoint: Checkpoint,
    names: list[str],
    output: Path,
    type_name: str | None,
    embedding: str | None,
    lossy: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Write `output`; returns the report of each matrix.

    names: of all tensors to write. type_name, embedding: see gguf_plan.choose.
    """
    _, row = architecture(checkpoint.config)
    shapes = {name: tuple(checkpoint.shape(name)) for name in names}
    tensors = planned_tensors(checkpoint.config, shapes, row.names)
    wanted, around = parse_type(type_name), parse_type(embedding)
    choices = {tensor.name: choose(checkpoint, tensor, wanted, around) for tensor in tensors if tensor.matrix}
    lost = [choice for choice in choices.values() if choice.lost]
    if lost and not lossy:
        found = [(c.name, c.stored, c.type, _try(checkpoint, c)) for c in lost]
        refuse(f"gguf:{type_name}", found, "gguf alone")
    vectors = rope_vectors(checkpoint.config)
    entries = [Entry(name, vector.shape, _F32) for name, vector in vectors.items()]
    for tensor in tensors:
        number = BY_NAME[choices[tensor.name].type].number if tensor.name in choices else _F32
        entries.append(Entry(tensor.name, tensor.shape, number))
    done, total = 0, sum(int(np.prod(tensor.shape)) for tensor in tensors)
    report = []
    with GGUFWriter(output, _pairs(checkpoint, choices, tensors, vectors), entries) as writer:
        for name, vector in vectors.items():
            writer.write(name, vector.view(np.uint8))
        for tensor in tensors:
            if tensor.name in choices:
                report.append(_write_matrices(checkpoint, choices[tensor.name], writer))
            else:
                _write_floats(checkpoint, tensor, row, writer)
            done += int(np.prod(tensor.shape))
            progress(done, total, tensor.name)
    return report


def _pairs(
    checkpoint: Checkpoint, choices: dict[str, Choice], tensors: list[Planned], vectors: dict[str, np.ndarray]
) -> list[Any]:
    common = Counter(choice.type for choice in choices.values()).most_common(1)
    file_type = FILE_TYPES[common[0][0]] if common else 0
    if isinstance(checkpoint, GGUFCheckpoint):
        return copied(checkpoint.metadata, file_type)
    stored = [tensor.name for tensor in tensors]
    pairs = description(checkpoint.config, checkpoint.path.name, file_type, stored, vectors)
    tokenizer = checkpoint.tokenizer()
    return pairs if tokenizer is None else pairs + vocabulary(tokenizer, checkpoint.config.vocab_size)


def _write_matrices(checkpoint: Checkpoint, choice: Choice, writer: GGUFWriter) -> dict[str, Any]:
    planned = choice.planned
    loss = Loss(int(np.prod(planned.shape)))
    for part in planned.parts:
        matrix = part.matrix(checkpoint)
        exact = exact_rows(matrix, choice.type) if choice.exact else None
        for first, piece in slabs(matrix):
            writer.write(planned.name, _encoded(piece, first, choice, exact, loss))
    kind = BY_NAME[choice.type]
    return {
        "name": choice.name,
        "stored_name": planned.name,
        "shape": [int(np.prod(planned.shape[:-1])), planned.shape[-1]],
        "from": choice.stored,
        "type": choice.type,
        "bits_per_weight": 8 * kind.nbytes / kind.block,
        "exact": choice.exact,
        **({"why": choice.why} if choice.why else {}),
        **loss.report(),
    }


def _encoded(part: PackedMatrix, first: int, choice: Choice, exact: Rows | None, loss: Loss) -> np.ndarray:
    """The bytes of some rows; what rounding them lost is added to `loss`."""
    if exact is not None:
        return exact(first, part.out_features)
    weight = decoded(part)
    raw = fitted(weight, choice.type, f"export {choice.name}")
    rows = loss.sample(*weight.shape)
    kind = BY_NAME[choice.type]
    if rows and kind.readable:
        loss.add(weight[:rows], decode(raw[:rows].reshape(-1), kind).reshape(rows, -1))
    return raw


def _try(checkpoint: Checkpoint, choice: Choice) -> Loss:
    """What rounding the tensor would lose, on a sample of its first rows."""
    matrix = checkpoint.matrix(choice.planned.parts[0].name)
    loss = Loss(matrix.out_features * matrix.in_features)
    part = rows_of(matrix, 0, loss.sample(*matrix.shape))
    _encoded(part, 0, choice, None, loss)
    return loss


def _write_floats(checkpoint: Checkpoint, tensor: Planned, row: Architecture, writer: GGUFWriter) -> None:
    values = tensor.read(checkpoint)
    if row.norm_shift and all(is_shifted_norm(name) for name in tensor.stored.parts):
        values = values + np.float32(row.norm_shift)
    if not np.isfinite(values).all():
        raise CheckpointError(f"export {tensor.name}: a value is not finite; the checkpoint is damaged")
    writer.write(tensor.name, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
