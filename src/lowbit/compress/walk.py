"""Quantize a whole checkpoint: one tensor after the other is read, rounded and written.

Only one tensor is in memory at a time. The layout of the file is known from the shapes and formats, so its
header is written first and every tensor goes straight to its place.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.compress.description import write_description, write_json
from lowbit.compress.directory import atomic_directory, check_target
from lowbit.errors import CheckpointError
from lowbit.formats import Format, Scheme
from lowbit.model.checkpoint import Checkpoint, open_checkpoint
from lowbit.packed import TensorWriter, planned_arrays
from lowbit.packed.planned import ArrayLayout
from lowbit.quantize.round_to_nearest import check_finite, quantize_with_error

VERSION = 1  # of the directory, see docs/formats.md
Progress = Callable[[float, float, str], None]


def quantize_checkpoint(
    source: str | os.PathLike[str],
    scheme: Scheme | str,
    output: str | os.PathLike[str],
    search: str = "mse",
    progress: Progress | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Quantize every matrix of a checkpoint by round-to-nearest and write a lowbit directory.

    source: a transformers directory, a GGUF file or a lowbit directory
    scheme: which format each tensor takes; norms and biases stay float32
    output: the directory to write; it appears when everything is done, or not at all
    search: "mse" or "minmax", see `quantize.round_to_nearest`
    progress: called as progress(weights done, weights in all, tensor name) after each tensor
    force: replace `output` if it holds a lowbit model

    Returns {"output", "bits_per_weight" (over all matrices, everything stored counts), "seconds",
    "peak_rss_bytes", "layers": [{"name", "shape", "format", "bits_per_weight", "relative_squared_error"}]}.
    Raises FormatError before anything is written if a group size does not fit a matrix.
    """
    started = time.perf_counter()
    scheme = Scheme.parse(scheme)
    target = Path(output)
    check_target(target, force)
    with open_checkpoint(source) as checkpoint:
        formats = plan(checkpoint, scheme)
        with atomic_directory(target, force) as folder:
            layers, metas = _write_tensors(checkpoint, formats, folder, search, progress)
            quantization = {"quant_method": "lowbit", "version": VERSION, "scheme": scheme.to_dict()}
            write_description(checkpoint, folder, quantization)
            details = {
                "version": VERSION,
                "format": "lowbit",
                "source": Path(source).name,
                "scheme": scheme.to_dict(),
                "method": "round_to_nearest",
                "search": search,
                "tensors": metas,
            }
            write_json(folder / "lowbit.json", details)
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    bits = sum(layer["bits_per_weight"] * layer["shape"][0] * layer["shape"][1] for layer in layers)
    return {
        "output": str(target),
        "bits_per_weight": bits / weights,
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": peak_rss_bytes(),
        "layers": layers,
    }


def plan(checkpoint: Checkpoint, scheme: Scheme) -> dict[str, Format | None]:
    """The format of every tensor by name; None for norms and biases.

    Raises FormatError that names the tensor if a group size does not divide its inputs.
    """
    formats: dict[str, Format | None] = {}
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        if len(shape) == 2:
            formats[name] = format = scheme.format_for(name)
            if not format.coded:
                planned_arrays(format, shape[0], shape[1], f"quantize {name}")
        elif len(shape) == 1:
            formats[name] = None
        else:
            raise CheckpointError(
                f"quantize {name}: it has shape {list(shape)}; matrices and vectors are all that lowbit runs"
            )
    if not any(formats.values()):
        raise CheckpointError(f"quantize {checkpoint.path}: it holds no matrix; give a language model")
    return formats


def _write_tensors(
    checkpoint: Checkpoint,
    formats: dict[str, Format | None],
    folder: Path,
    search: str,
    progress: Progress | None,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Write model.safetensors: (report of each matrix, its entry in lowbit.json by name)."""
    layout: dict[str, tuple[Any, tuple[int, ...]]] = {}
    shapes = {name: checkpoint.shape(name) for name in formats}
    for name, format in formats.items():
        if format is None:
            layout[name] = (np.float32, shapes[name])
        else:
            arrays = _arrays(checkpoint, name, format)
            layout.update({f"{name}.{entry}": array for entry, array in arrays.items()})
    layers: list[dict[str, Any]] = []
    metas: dict[str, dict[str, Any]] = {}
    done, total = 0, sum(int(np.prod(shape)) for shape in shapes.values())
    with TensorWriter(folder / "model.safetensors", layout, {"format": "lowbit"}) as writer:
        for name, format in formats.items():
            values = checkpoint.read(name)
            if format is None:
                check_finite(values.reshape(1, -1), f"quantize {name}")
                writer.write(name, values)
            else:
                matrix, error = quantize_with_error(values, format, search, f"quantize {name}")
                meta, stored = matrix.state()
                for entry, array in stored.items():
                    writer.write(f"{name}.{entry}", array)
                metas[name] = meta | {"relative_squared_error": error}
                layers.append(
                    {
                        "name": name,
                        "shape": list(matrix.shape),
                        "format": format.name,
                        "bits_per_weight": matrix.bits_per_weight,
                        "relative_squared_error": error,
                    }
                )
            done += values.size
            if progress is not None:
                progress(done, total, name)
    return layers, metas


def _arrays(checkpoint: Checkpoint, name: str, format: Format) -> ArrayLayout:
    """The arrays that matrix `name` will store. A format that codes its weights has to see them for that."""
    if not format.coded:
        shape = checkpoint.shape(name)
        return planned_arrays(format, shape[0], shape[1])
    matrix, _ = quantize_with_error(checkpoint.read(name), format, what=f"quantize {name}")
    return {entry: (array.dtype.type, array.shape) for entry, array in matrix.state()[1].items()}


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
