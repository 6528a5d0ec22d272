"""Quantize a whole checkpoint into a lowbit directory.

Rounding to nearest takes one tensor after the other: read, rounded, written to its place in a file whose
header is known from shapes and formats. Every other method goes layer by layer (layers.py) into parts that
survive a kill (parts.py), which are joined at the end.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.compress.calibration import calibration_windows
from lowbit.compress.coverage import USUAL, Coverage, summary
from lowbit.compress.description import write_description, write_json
from lowbit.compress.directory import atomic_directory, check_target
from lowbit.compress.layers import part_names, quantize_layers
from lowbit.compress.parts import Parts
from lowbit.compress.recipe import parse_recipe
from lowbit.errors import CheckpointError, RequestError
from lowbit.formats import Format, Scheme
from lowbit.formats.auto import Auto
from lowbit.model.checkpoint import Checkpoint, open_checkpoint
from lowbit.model.lowbit_checkpoint import FILE_METADATA
from lowbit.model.tensors import expected_tensors
from lowbit.packed import PackedMatrix, TensorWriter, planned_arrays
from lowbit.packed.planned import ArrayLayout
from lowbit.quantize.round_to_nearest import check_finite, quantize_with_error

VERSION = 1  # of the directory, see docs/formats.md
_ERRORS = ("relative_squared_error", "relative_output_error")
Progress = Callable[[float, float, str], None]
Formats = dict[str, Format | None]


def quantize_checkpoint(
    source: str | os.PathLike[str],
    scheme: Scheme | Auto | str,
    output: str | os.PathLike[str],
    search: str = "mse",
    progress: Progress | None = None,
    force: bool = False,
    method: str = "rtn",
    calibration: str | os.PathLike[str] | Sequence[str] | np.ndarray | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    restart: bool = False,
    coverage: Coverage = USUAL,
) -> dict[str, Any]:
    """Quantize every matrix of a checkpoint and write a lowbit directory.

    source: a transformers directory, a GGUF file or a lowbit directory
    scheme: which format each tensor takes, or an Auto, which finds that out; norms and biases stay float32
    output: the directory to write; it appears when everything is done, or not at all
    search: "mse" or "minmax", see `quantize.round_to_nearest`, for methods that have the option
    progress: called as progress(weights done, weights in all, tensor name) after each tensor
    force: replace `output` if it holds a lowbit model
    method: see compress/recipe.py, such as "rtn" or "gptq:order=activation"
    calibration: for methods that need it: a text file, texts, or token ids int64 [windows, positions]; None:
        the shipped text
    samples, length: how many windows of how many tokens are drawn from the text; None: 128 of 512, or what
        the text has and the model holds
    seed: of that drawing
    restart: throw an unfinished run to the same output away instead of finishing it
    coverage: of experts, how many tokens of the text each must see

    Returns {"output", "method", "bits_per_weight" (over all matrices, everything stored counts), "seconds",
    "peak_rss_bytes", "calibration_tokens", "layers": [{"name", "shape", "format", "bits_per_weight",
    "relative_squared_error", and where inputs were seen "relative_output_error" and "input_histogram" of
    their channels, of an expert's matrices also the "tokens" it saw}]}, "experts", see coverage.summary,
    where text ran through some, and "auto", what `resolve_auto` tells, where it chose.
    Raises FormatError before anything is written if a group size does not fit a matrix.
    """
    started = time.perf_counter()
    auto = scheme if isinstance(scheme, Auto) else None
    recipe = parse_recipe(method, search)
    target = Path(output)
    check_target(target, force)
    with open_checkpoint(source) as stored:
        checkpoint = recipe.view(stored)
        tokens, chosen = None, None
        if recipe.calibrated or auto is not None:
            tokens = calibration_windows(calibration, checkpoint, samples, length, seed)
        elif calibration is not None:
            raise RequestError(f"quantize: method {recipe} runs no text; leave calibration away")
        if auto is not None:
            from lowbit.compress.choose import resolve_auto

            assert tokens is not None
            scheme, chosen = resolve_auto(auto, checkpoint, tokens, recipe.method, progress)
        assert not isinstance(scheme, Auto)
        scheme = Scheme.parse(scheme)
        formats = plan(checkpoint, scheme)
        seen = tokens if recipe.calibrated else None
        details = {
            "version": VERSION,
            "format": "lowbit",
            "source": Path(source).name,
            "scheme": scheme.to_dict(),
            "method": str(recipe),
            "calibration": _digest(tokens),
        }
        if chosen is not None:
            details["auto"] = {key: value for key, value in chosen.items() if key != "items"}
        if recipe.plain:
            with atomic_directory(target, force) as folder:
                layers, metas = _write_tensors(checkpoint, formats, folder, search, progress)
                _describe(checkpoint, scheme, details | {"tensors": metas}, folder)
        else:
            request = details | {"source": _identity(Path(source))}
            if checkpoint.config.n_experts:
                request["coverage"] = [coverage.tokens, coverage.few]
            with Parts(target, request, restart) as parts:
                tell = progress or (lambda *_: None)
                quantize_layers(checkpoint, formats, recipe, parts, seen, tell, coverage)
                with atomic_directory(target, force) as folder:
                    layers, metas = _join(checkpoint, formats, parts, folder)
                    if (reached := summary(layers, coverage.tokens)) is not None:
                        details["experts"] = reached
                    _describe(checkpoint, scheme, details | {"tensors": metas}, folder)
                parts.discard()
    extra = {} if chosen is None else {"auto": chosen}
    if (reached := summary(layers, coverage.tokens)) is not None:
        extra["experts"] = reached
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    bits = sum(layer["bits_per_weight"] * layer["shape"][0] * layer["shape"][1] for layer in layers)
    return {
        "output": str(target),
        "method": str(recipe),
        "bits_per_weight": bits / weights,
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": peak_rss_bytes(),
        "calibration_tokens": 0 if tokens is None else int(tokens.size),
        "layers": layers,
        **extra,
    }


def plan(checkpoint: Checkpoint, scheme: Scheme) -> Formats:
    """The format of every tensor by name; None for norms and biases.

    Raises FormatError that names the tensor if a group size does not divide its inputs.
    """
    formats: Formats = {}
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


def _describe(checkpoint: Checkpoint, scheme: Scheme, details: dict[str, Any], folder: Path) -> None:
    quantization = {"quant_method": "lowbit", "version": VERSION, "scheme": scheme.to_dict()}
    write_description(checkpoint, folder, quantization)
    write_json(folder / "lowbit.json", details)


def _write_tensors(
    checkpoint: Checkpoint, formats: Formats, folder: Path, search: str, progress: Progress | None
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
    with TensorWriter(folder / "model.safetensors", layout, FILE_METADATA) as writer:
        for name, format in formats.items():
            values = checkpoint.read(name)
            if format is None:
                check_finite(values.reshape(1, -1), f"quantize {name}")
                writer.write(name, values)
            else:
                matrix, error = quantize_with_error(values, format, search, f"quantize {name}")
                report = {"relative_squared_error": error}
                _record(name, matrix, report, writer, layers, metas)
            done += values.size
            if progress is not None:
                progress(done, total, name)
    return layers, metas


def _join(
    checkpoint: Checkpoint, formats: Formats, parts: Parts, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """`_write_tensors` from finished parts. What was planned and what is there must be the same."""
    layout: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for part in part_names(checkpoint):
        for name, tensor in parts.read(part)[0].items():
            if isinstance(tensor, PackedMatrix):
                arrays = {f"{name}.{entry}": array for entry, array in tensor.state()[1].items()}
            else:
                arrays = {name: tensor}
            layout.update({key: (array.dtype.type, array.shape) for key, array in arrays.items()})
    layers: list[dict[str, Any]] = []
    metas: dict[str, dict[str, Any]] = {}
    missing = set(formats)
    with TensorWriter(folder / "model.safetensors", layout, FILE_METADATA) as writer:
        for part in part_names(checkpoint):
            tensors, report = parts.read(part)
            for name, tensor in tensors.items():
                missing.remove(name)
                if isinstance(tensor, PackedMatrix):
                    _record(name, tensor, report[name], writer, layers, metas)
                else:
                    writer.write(name, tensor)
    wanted = {tensor.name for tensor in expected_tensors(checkpoint.config)} & set(formats)
    if lost := missing | {name for name in wanted if formats[name] is not None and name not in metas}:
        raise CheckpointError(
            f"quantize: {len(lost)} tensors were planned and not quantized: {sorted(lost)[:4]}"
        )
    return layers, metas


def _record(
    name: str,
    matrix: PackedMatrix,
    report: dict[str, Any],
    writer: TensorWriter,
    layers: list[dict[str, Any]],
    metas: dict[str, dict[str, Any]],
) -> None:
    meta, stored = matrix.state()
    for entry, array in stored.items():
        writer.write(f"{name}.{entry}", array)
    # What differs from run to run stays out of the file.
    metas[name] = meta | {key: value for key, value in report.items() if key in _ERRORS}
    layers.append(
        {
            "name": name,
            "shape": list(matrix.shape),
            "format": matrix.format_name,
            "bits_per_weight": matrix.bits_per_weight,
            **report,
        }
    )


def _arrays(checkpoint: Checkpoint, name: str, format: Format) -> ArrayLayout:
    """The arrays that matrix `name` will store. A format that codes its weights has to see them for that."""
    if not format.coded:
        shape = checkpoint.shape(name)
        return planned_arrays(format, shape[0], shape[1])
    matrix, _ = quantize_with_error(checkpoint.read(name), format, what=f"quantize {name}")
    return {entry: (array.dtype.type, array.shape) for entry, array in matrix.state()[1].items()}


def _identity(source: Path) -> list[Any]:
    """What tells whether a checkpoint is still the same: names, sizes and times of its files."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _digest(tokens: np.ndarray | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    digest = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
    return {"windows": int(tokens.shape[0]), "length": int(tokens.shape[1]), "sha256": digest}


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
