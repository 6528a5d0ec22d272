"""A model into a directory that transformers and vLLM open: safetensors beside config.json and tokenizer.

Linear layers are stored by a target (module.py), everything else as floats: of the type that the source has,
or for what was stored in few bits the smallest type that holds it, so that nothing is lost by default.
lowbit_export.json says what was done; it also marks the directory as one that --force may replace.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.compress.description import write_description, write_json
from lowbit.compress.directory import atomic_directory
from lowbit.errors import CheckpointError, RequestError, UnsupportedError
from lowbit.interop import awq, bitnet, compressed_tensors, gptq
from lowbit.interop.gguf_exact import narrowed, widened
from lowbit.interop.loss import Loss, refuse
from lowbit.interop.module import Packing, Seen, Target, rounded
from lowbit.interop.parts import Planned, planned_tensors
from lowbit.interop.slabs import decoded, rows_of, slabs
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.tensors import EMBEDDING, HEAD
from lowbit.packed import FloatTerm, PackedMatrix, TensorWriter

Progress = Callable[[float, float, str], None]
TARGETS: dict[str, Target] = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "bitnet": bitnet,
}
_FLOATS = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
_TORCH = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_STORED = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32}


def export_directory(
    checkpoint: Checkpoint,
    names: list[str],
    output: Path,
    kind: str,
    format: str | None,
    embedding: str | None,
    lossy: bool,
    force: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Write the directory `output`; returns the report of each matrix.

    names: of all tensors to write. kind: of TARGETS, or "safetensors" for floats alone; format: of the
    layers, None: as stored; embedding: the float type of everything else, None: as said above
    """
    if checkpoint.config.rope.kind == "factors":
        raise UnsupportedError(
            f"export to {kind}: this GGUF file has factors of rotation speeds, for which transformers has no "
            "words; start from the transformers directory of the model"
        )
    shapes = {name: tuple(checkpoint.shape(name)) for name in names}
    tensors = planned_tensors(checkpoint.config, shapes, None)
    target = TARGETS.get(kind)
    floats = _float_choice(kind, format, embedding)
    layers = {t.name: t for t in tensors if target is not None and _is_layer(t)}
    if target is not None and not layers:
        raise UnsupportedError(
            f"export to {kind}: a {checkpoint.config.family} checkpoint has no linear layers"
        )
    seen = {_module(name): _see(checkpoint, tensor) for name, tensor in layers.items()}
    packings = target.settle(seen, format) if target is not None else {}
    lost = [name for name in layers if _loses(seen[_module(name)], packings[_module(name)])]
    kinds = {t.name: _kept_type(checkpoint, t, floats, lossy) for t in tensors if t.name not in layers}
    worse = [t for t in tensors if t.name in kinds and kinds[t.name][1]]
    if (lost or worse) and not lossy:
        what = [(name, seen[_module(name)], packings[_module(name)]) for name in lost]
        found = [(name, _dtype(checkpoint, layers[name]), p.format, _try(s, p)) for name, s, p in what]
        found += [_try_float(checkpoint, t, kinds[t.name][0]) for t in worse]
        refuse(f"{kind}:{format}" if format else kind, found, f"{kind} alone" if format else None)

    layout: dict[str, Any] = {}
    for tensor in tensors:
        if tensor.name in layers:
            rows, columns = tensor.shape
            arrays = packings[_module(tensor.name)].layout(rows, columns)
            layout.update({f"{_module(tensor.name)}.{suffix}": entry for suffix, entry in arrays.items()})
        else:
            layout[tensor.name] = (kinds[tensor.name][0], tensor.shape)
    done, total = 0, sum(int(np.prod(tensor.shape)) for tensor in tensors)
    report: list[dict[str, Any]] = []
    with atomic_directory(output, force) as folder:
        with TensorWriter(folder / "model.safetensors", layout, {"format": "pt"}) as writer:
            for tensor in tensors:
                module = _module(tensor.name)
                if tensor.name in layers:
                    report.append(
                        _write_layer(checkpoint, tensor, seen.pop(module), packings[module], writer)
                    )
                else:
                    told = _write_floats(checkpoint, tensor, kinds[tensor.name][0], writer)
                    report += [told] if len(tensor.shape) == 2 else []
                done += int(np.prod(tensor.shape))
                progress(done, total, tensor.name)
        kept = [_module(t.name) for t in tensors if t.name not in layers and _is_linear(t)]
        if checkpoint.config.tied and "lm_head" not in kept:
            kept.append("lm_head")  # the module is there, though nothing is stored for it
        config = target.quantization_config(packings, kept) if target is not None else None
        dtype = _TORCH[
            kinds[next(t.name for t in tensors if t.name in kinds and EMBEDDING in t.stored.parts)][0]
        ]
        if kind in ("gptq", "awq"):
            dtype = "float16"  # all that their kernels take
        write_description(checkpoint, folder, config, {"dtype": dtype, "torch_dtype": dtype})
        details = {"source": checkpoint.path.name, "target": kind, "format": format, "tensors": report}
        write_json(folder / "lowbit_export.json", details)
    return report


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _is_linear(tensor: Planned) -> bool:
    """Is it a matrix that a Linear holds? The head is one, tables of tokens and positions are not."""
    inside = any(part.name.startswith("model.layers.") for part in tensor.parts)
    return (
        len(tensor.shape) == 2 and tensor.name.endswith(".weight") and (inside or HEAD in tensor.stored.parts)
    )


def _is_layer(tensor: Planned) -> bool:
    """Is it a layer that is quantized: a matrix inside the network that is no router?"""
    return _is_linear(tensor) and tensor.matrix and HEAD not in tensor.stored.parts


def _see(checkpoint: Checkpoint, tensor: Planned) -> Seen:
    first = checkpoint.dtype(tensor.parts[0].name)
    if first in ("F32", "F16", "BF16"):
        return Seen((tensor.shape[0], tensor.shape[1]), True, ())
    matrices = tuple(part.matrix(checkpoint) for part in tensor.parts)
    floats = all(isinstance(term, FloatTerm) for matrix in matrices for term in matrix.terms)
    return Seen((tensor.shape[0], tensor.shape[1]), floats, matrices)


def _loses(seen: Seen, packing: Packing) -> bool:
    return not seen.floats and packing.arrays(seen.matrices) is None


def _dtype(checkpoint: Checkpoint, tensor: Planned) -> str:
    return ", ".join(dict.fromkeys(checkpoint.dtype(name) for name in tensor.stored.parts))


def _float_choice(kind: str, format: str | None, embedding: str | None) -> str | None:
    """The safetensors type of floats that the user asked for."""
    asked = format if kind == "safetensors" else embedding
    if asked is None or asked in _FLOATS:
        return None if asked is None else _FLOATS[asked]
    raise RequestError(f"export to {kind}: {asked!r} is no type of floats; choose {', '.join(_FLOATS)}")


def _kept_type(checkpoint: Checkpoint, tensor: Planned, asked: str | None, lossy: bool) -> tuple[str, bool]:
    """(the type of a tensor that stays floats, is something stored in few bits lost by it?)"""
    if len(tensor.shape) == 1:
        return "F32" if asked is None else asked, False
    stored = {checkpoint.dtype(name) for name in tensor.stored.parts}
    if stored <= {*_STORED}:
        own = stored.pop() if len(stored) == 1 else "F32"
        return asked or own, False
    for kind in ("BF16", "F16"):
        if asked in (None, kind) and _holds(checkpoint, tensor, kind):
            return kind, False
    if asked is None:
        return ("F16", True) if lossy else ("F32", False)
    return asked, asked != "F32"


def _holds(checkpoint: Checkpoint, tensor: Planned, kind: str) -> bool:
    for part in tensor.parts:
        for _, piece in slabs(part.matrix(checkpoint)):
            values = decoded(piece)
            if not np.array_equal(widened(narrowed(values, kind), kind), values):
                return False
    return bool(tensor.parts)


def _write_layer(
    checkpoint: Checkpoint, tensor: Planned, seen: Seen, packing: Packing, writer: TensorWriter
) -> dict[str, Any]:
    loss = Loss(seen.shape[0] * seen.shape[1])
    arrays = None if seen.floats else packing.arrays(seen.matrices)
    exact = arrays is not None
    if arrays is None:
        matrices = seen.matrices or tuple(part.matrix(checkpoint) for part in tensor.parts)
        arrays = _rounded(matrices, packing, f"export {tensor.name}", loss)
    for suffix, array in arrays.items():
        writer.write(f"{_module(tensor.name)}.{suffix}", array)
    told = packing.format if exact or not hasattr(packing, "shape") else packing.shape.name
    return _report(checkpoint, tensor, told, packing.bits_per_weight, exact, loss)


def _rounded(
    matrices: tuple[PackedMatrix, ...], packing: Packing, what: str, loss: Loss
) -> dict[str, np.ndarray]:
    weight = decoded(matrices[0]) if len(matrices) == 1 else np.concatenate([decoded(m) for m in matrices])
    matrix = rounded(weight, packing, what)
    arrays = packing.arrays((matrix,))
    if arrays is None:
        raise UnsupportedError(f"{what} to {packing.format}: the weights are beyond its scales")
    rows = loss.sample(*weight.shape)
    loss.add(weight[:rows], rows_of(matrix, 0, rows).dequantize())
    return arrays


def _try(seen: Seen, packing: Packing) -> Loss:
    loss = Loss(seen.shape[0] * seen.shape[1])
    _rounded(seen.matrices, packing, "export", loss)
    return loss


def _try_float(checkpoint: Checkpoint, tensor: Planned, kind: str) -> tuple[str, str, str, Loss]:
    matrix = tensor.parts[0].matrix(checkpoint)
    loss = Loss(matrix.out_features * matrix.in_features)
    for _, piece in slabs(matrix):
        rows = loss.sample(*piece.shape)
        values = decoded(piece)[:rows]
        loss.add(values, widened(narrowed(values, kind), kind))
    return tensor.name, _dtype(checkpoint, tensor), kind, loss


def _write_floats(checkpoint: Checkpoint, tensor: Planned, kind: str, writer: TensorWriter) -> dict[str, Any]:
    loss = Loss(int(np.prod(tensor.shape)))
    if len(tensor.shape) == 2 and tensor.parts:
        for part in tensor.parts:
            for _, piece in slabs(part.matrix(checkpoint)):
                values = decoded(piece)
                stored = _narrow(values, kind, tensor.name)
                writer.write_rows(tensor.name, stored)
                rows = loss.sample(*values.shape)
                loss.add(values[:rows], widened(stored[:rows], kind).reshape(rows, -1))
    else:
        writer.write(tensor.name, _narrow(tensor.read(checkpoint), kind, tensor.name))
    exact = not loss.changed
    return _report(checkpoint, tensor, kind, 8.0 * np.dtype(_STORED[kind]).itemsize, exact, loss)


def _narrow(values: np.ndarray, kind: str, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise CheckpointError(f"export {name}: a value is not finite; the checkpoint is damaged")
    if kind == "F16" and values.size and float(np.abs(values).max()) >= 65520:
        raise UnsupportedError(f"export {name} to fp16: a value is above 65504; take bf16")
    return narrowed(values, kind).reshape(-1).view(_STORED[kind]).reshape(values.shape)


def _report(
    checkpoint: Checkpoint, tensor: Planned, kind: str, bits: float, exact: bool, loss: Loss
) -> dict[str, Any]:
    return {
        "name": next(iter(tensor.stored.parts)) if len(tensor.stored.parts) == 1 else tensor.name,
        "stored_name": tensor.name,
        "shape": [int(np.prod(tensor.shape[:-1])), tensor.shape[-1]],
        "from": _dtype(checkpoint, tensor),
        "type": kind,
        "bits_per_weight": bits,
        "exact": exact,
        **({} if exact else loss.report()),
    }
