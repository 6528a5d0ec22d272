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
from lowbit.interop.gguf_metadata import copied, description, rope_factors, row_order, tensor_name
from lowbit.interop.gguf_plan import FILE_TYPES, Choice, parse_type, plan
from lowbit.interop.gguf_vocabulary import vocabulary
from lowbit.interop.gguf_writer import Entry, GGUFWriter
from lowbit.interop.loss import Loss, refuse
from lowbit.interop.slabs import decoded, rows_of, slabs
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.gguf_checkpoint import GGUFCheckpoint
from lowbit.model.gguf_config import ROPE_FACTORS
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

    names: of all tensors to write. type_name, embedding: see gguf_plan.plan.
    """
    shapes = {name: tuple(checkpoint.shape(name)) for name in names}
    matrices = [name for name in names if len(shapes[name]) == 2]
    choices = {
        choice.name: choice
        for choice in plan(checkpoint, matrices, parse_type(type_name), parse_type(embedding), lossy)
    }
    lost = [choice for choice in choices.values() if choice.lost]
    if lost and not lossy:
        refuse(
            f"gguf:{type_name}", [(c.name, c.stored, c.type, _try(checkpoint, c)) for c in lost], "gguf alone"
        )
    factors = _factors(checkpoint)
    entries = [Entry(ROPE_FACTORS, factors.shape, _F32)] if factors is not None else []
    for name in names:
        number = BY_NAME[choices[name].type].number if name in choices else _F32
        entries.append(Entry(_stored_name(checkpoint, name), shapes[name], number))
    done, total = 0, sum(int(np.prod(shape)) for shape in shapes.values())
    report = []
    with GGUFWriter(output, _pairs(checkpoint, choices), entries) as writer:
        if factors is not None:
            writer.write(ROPE_FACTORS, factors.view(np.uint8))
        for name in names:
            if name in choices:
                report.append(_write_matrix(checkpoint, choices[name], writer))
            else:
                _write_vector(checkpoint, name, writer)
            done += int(np.prod(shapes[name]))
            progress(done, total, name)
    return report


def _pairs(checkpoint: Checkpoint, choices: dict[str, Choice]) -> list[Any]:
    common = Counter(choice.type for choice in choices.values()).most_common(1)
    file_type = FILE_TYPES[common[0][0]] if common else 0
    if isinstance(checkpoint, GGUFCheckpoint):
        return copied(checkpoint.metadata, file_type)
    pairs = description(checkpoint.config, checkpoint.path.name, file_type)
    tokenizer = checkpoint.tokenizer()
    return pairs if tokenizer is None else pairs + vocabulary(tokenizer, checkpoint.config.vocab_size)


def _stored_name(checkpoint: Checkpoint, name: str) -> str:
    return checkpoint.stored_name(name) if isinstance(checkpoint, GGUFCheckpoint) else tensor_name(name)


def _factors(checkpoint: Checkpoint) -> np.ndarray | None:
    return rope_factors(checkpoint.config)


def _matrix(checkpoint: Checkpoint, name: str) -> PackedMatrix:
    """The matrix with its rows in the file's order."""
    matrix = checkpoint.matrix(name)
    order = row_order(name, checkpoint.config, matrix.out_features)
    return matrix if order is None else matrix.permute_rows(order)


def _write_matrix(checkpoint: Checkpoint, choice: Choice, writer: GGUFWriter) -> dict[str, Any]:
    matrix = _matrix(checkpoint, choice.name)
    exact = exact_rows(matrix, choice.type) if choice.exact else None
    stored, loss = _stored_name(checkpoint, choice.name), Loss(matrix.out_features * matrix.in_features)
    for first, part in slabs(matrix):
        writer.write(stored, _encoded(part, first, choice, exact, loss))
    return {
        "name": choice.name,
        "stored_name": stored,
        "shape": list(choice.shape),
        "from": choice.stored,
        "type": choice.type,
        "bits_per_weight": 8 * BY_NAME[choice.type].nbytes / BY_NAME[choice.type].block,
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
    """What rounding the matrix would lose, on a sample of its rows."""
    matrix = checkpoint.matrix(choice.name)
    loss = Loss(matrix.out_features * matrix.in_features)
    part = rows_of(matrix, 0, loss.sample(*matrix.shape))
    _encoded(part, 0, choice, None, loss)
    return loss


def _write_vector(checkpoint: Checkpoint, name: str, writer: GGUFWriter) -> None:
    values = np.ascontiguousarray(checkpoint.read(name), np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"export {name}: it holds values that are not finite; the checkpoint is damaged"
        )
    order = row_order(name, checkpoint.config, len(values))
    if order is not None:
        values = values[order]
    writer.write(_stored_name(checkpoint, name), values.view(np.uint8))
