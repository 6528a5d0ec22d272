"""save_pretrained of a model with packed weights: a directory as `lowbit quantize` writes it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.errors import RequestError
from lowbit.interop.transformers.modules import PackedEmbedding, PackedLinear
from lowbit.interop.transformers.packed import as_array
from lowbit.model.float_weights import float_matrix
from lowbit.model.lowbit_checkpoint import FILE_METADATA, VERSION
from lowbit.packed import PackedMatrix, TensorWriter
from lowbit.quantize.round_to_nearest import round_to_nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lowbit.formats import Format
    from lowbit.interop.transformers.places import Model

# What transformers' save_pretrained takes and means nothing here, with the values that may be given.
_WITHOUT_EFFECT = {
    "is_main_process": (True,),
    "state_dict": (None,),
    "push_to_hub": (False,),
    "safe_serialization": (True,),
    "variant": (None,),
    "save_peft_format": (True, False),
    "save_original_format": (True,),
    "distributed_checkpoint": (False,),
}
_IGNORED = {"max_shard_size", "save_function", "token"}  # one file is written, and nothing is uploaded


def save_pretrained(model: Model, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """Write config.json, generation_config.json, lowbit.json and model.safetensors.

    lowbit and transformers load the directory with equal bits. The tokenizer is saved by itself, as always.
    options: those of transformers; what would change the files is refused. For the hub: model.push_to_hub().
    """
    for name, value in options.items():
        if name not in _IGNORED and value not in _WITHOUT_EFFECT.get(name, ()):
            raise RequestError(
                f"save_pretrained: {name}={value!r} does not go with packed weights; leave it away"
                + ("; use model.push_to_hub(repo_id)" if name == "push_to_hub" else "")
            )
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    taken = model.lowbit
    packed = dict(_packed(model))
    plain = dict(_plain(model))
    layout: dict[str, Any] = {}
    metas: dict[str, dict[str, Any]] = {}
    known = (taken.details or {}).get("tensors", {})
    for name, matrix in packed.items():
        meta, arrays = matrix.state()
        layout.update({f"{name}.{entry}": (array.dtype.type, array.shape) for entry, array in arrays.items()})
        metas[name] = {**known.get(name, {}), **meta}
    layout.update({name: (np.float32, array.shape) for name, array in plain.items()})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    with TensorWriter(folder / "model.safetensors", layout, FILE_METADATA) as writer:
        for name, matrix in packed.items():
            for entry, array in matrix.state()[1].items():
                writer.write(f"{name}.{entry}", array)
        for name, array in plain.items():
            writer.write(name, array)
    details = taken.details or {
        "version": VERSION,
        "format": "lowbit",
        "source": Path(str(model.config.name_or_path)).name,
        "scheme": taken.config.scheme.to_dict(),
        "method": taken.config.method,
        "calibration": None,
    }
    text = json.dumps({**details, "tensors": metas}, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "lowbit.json").write_text(text + "\n", encoding="utf-8")


def _packed(model: Model) -> Iterator[tuple[str, PackedMatrix]]:
    """Matrices by canonical name; those of floats, too, for a lowbit directory has matrices only packed."""
    for module in model.modules():
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            yield from zip(module.names, module.matrices())
    yield from model.lowbit.stacked.items()
    scheme = model.lowbit.config.scheme
    for name, value in _floats(model):
        if value.ndim == 2:
            yield name, as_floats(value, scheme.format_for(name))


def as_floats(value: np.ndarray, format: Format) -> PackedMatrix:
    """A float32 matrix as plain floats of `format`, if it is one that holds them; as float32 else."""
    if format.float_type is not None and not format.coded:
        matrix = round_to_nearest(value, format)
        if np.array_equal(matrix.dequantize(), value):
            return matrix
    return float_matrix(value, "fp32")


def _plain(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, value) for name, value in _floats(model) if value.ndim != 2)


def _floats(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Canonical name and float32 values of what is not packed."""
    held = {name for slot in model.lowbit.slots for name in slot.names} | set(model.lowbit.stacked)
    tensors: dict[str, Any] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers()),
    }
    for name, source in model.lowbit.found.items():
        if name in held:
            continue
        yield name, np.ascontiguousarray(source.view(as_array(tensors[source.stored])))
