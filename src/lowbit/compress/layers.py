"""Quantize a checkpoint layer by layer with any method, keeping every finished layer.

Calibration windows run through the model one layer at a time. A layer first runs with its own weights while
the statistics of each matrix's input are taken; its matrices are quantized; then it runs again as it has
become, so that later layers see the errors of earlier ones. One layer's weights and the residual streams of
all windows are in memory, nothing else. A finished layer of an interrupted run is only run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.compress.coverage import USUAL, Coverage, expert_of
from lowbit.compress.parts import Parts
from lowbit.compress.recipe import Recipe
from lowbit.compress.refinements import Rows
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format
from lowbit.model.tensors import EMBEDDING, POSITIONS, leaders
from lowbit.packed import PackedMatrix
from lowbit.quantize.histogram import channel_histogram
from lowbit.quantize.methods import parse_method
from lowbit.quantize.round_to_nearest import check_finite
from lowbit.quantize.rows import refine_rows
from lowbit.quantize.statistics import Statistics

if TYPE_CHECKING:
    from lowbit.compress.blocks import Streams
    from lowbit.model.checkpoint import Checkpoint

Formats = dict[str, Format | None]
Progress = Callable[[float, float, str], None]
_AROUND = "around"  # the part of everything outside the layers


def quantize_layers(
    checkpoint: Checkpoint,
    formats: Formats,
    recipe: Recipe,
    parts: Parts,
    tokens: np.ndarray | None,
    progress: Progress,
    coverage: Coverage = USUAL,
) -> None:
    """Fill `parts`: "around" (embedding, head, final norm), then "layer-00000" and so on.

    formats: of every tensor; None for vectors, which stay float32
    tokens: int64 [windows, positions] that run through the model; None if the recipe needs none
    progress: called as progress(weights done, in all, tensor name)
    coverage: how many tokens an expert must see
    Embedding and head are rounded to nearest: nothing is known of what they read.
    """
    sizes = {name: int(np.prod(checkpoint.shape(name))) for name in formats}
    done, total = 0, sum(sizes.values())
    streams: Streams | None = None

    def tell(name: str) -> None:
        nonlocal done
        done += sizes[name]
        progress(done, total, name)

    layers = [_layer_names(formats, layer) for layer in range(checkpoint.config.n_layers)]
    inside = {name for names in layers for name in names}
    outside = [name for name in formats if name not in inside]
    if parts.finished(_AROUND):
        for name in outside:
            tell(name)
    else:
        _around(checkpoint, formats, outside, parts, tell)
    if tokens is not None:
        from lowbit.compress.blocks import Streams

        around = parts.read(_AROUND)[0]
        embedding, positions = around[EMBEDDING], around.get(POSITIONS)
        assert isinstance(embedding, PackedMatrix)
        places = positions.dequantize() if isinstance(positions, PackedMatrix) else None
        streams = Streams(checkpoint.config, embedding.dequantize(), tokens, places)
        del around, embedding, positions, places
    rows: Rows | None = None
    for layer, names in enumerate(layers):
        part = f"layer-{layer:05d}"
        if not parts.finished(part):
            if rows is None:
                rows = recipe.rows(checkpoint, tokens, formats)
            tensors, report = _quantize_layer(
                checkpoint, formats, recipe, layer, names, streams, rows, coverage, tell
            )
            parts.write(part, tensors, report)
        else:
            for name in names:
                tell(name)
        if streams is not None and layer + 1 < len(layers):
            streams.advance(layer, _decoded(parts.read(part)[0], layer))


def part_names(checkpoint: Checkpoint) -> list[str]:
    return [_AROUND, *(f"layer-{layer:05d}" for layer in range(checkpoint.config.n_layers))]


def _layer_names(formats: Formats, layer: int) -> list[str]:
    prefix = f"model.layers.{layer}."
    return [name for name in formats if name.startswith(prefix)]


def _around(
    checkpoint: Checkpoint, formats: Formats, names: list[str], parts: Parts, tell: Callable[[str], None]
) -> None:
    nearest = parse_method("rtn")
    tensors: dict[str, PackedMatrix | np.ndarray] = {}
    report = {}
    for name in names:
        weight, format = checkpoint.read(name), formats[name]
        if format is None:
            check_finite(weight.reshape(1, -1), f"quantize {name}")
            tensors[name] = weight
        else:
            check_finite(weight, f"quantize {name}")
            tensors[name] = matrix = nearest(weight, format)
            report[name] = _error(matrix, weight, None)
        tell(name)
    parts.write(_AROUND, tensors, report)


def _quantize_layer(
    checkpoint: Checkpoint,
    formats: Formats,
    recipe: Recipe,
    layer: int,
    names: list[str],
    streams: Streams | None,
    rows: Rows,
    coverage: Coverage,
    tell: Callable[[str], None],
) -> tuple[dict[str, PackedMatrix | np.ndarray], dict[str, Any]]:
    prefix = f"model.layers.{layer}."
    weights = {name.removeprefix(prefix): checkpoint.read(name) for name in names}
    for short, weight in weights.items():
        check_finite(weight.reshape(-1, weight.shape[-1]), f"quantize {prefix}{short}")
    statistics: dict[str, Statistics] = {}
    counts: dict[int, int] = {}
    if streams is not None:
        statistics, counts = coverage.check(checkpoint.config, layer, streams.watch(layer, weights))
    chosen = {name.removeprefix(prefix): formats[name] for name in names}
    if recipe.folds:
        matrices = {s.removesuffix(".weight"): f for s, f in chosen.items() if f is not None}
        statistics = recipe.fold(checkpoint.config, weights, statistics, matrices)
    leader = leaders(checkpoint.config, layer)
    tensors: dict[str, PackedMatrix | np.ndarray] = {}
    report = {}
    for name in names:
        short, format = name.removeprefix(prefix), formats[name]
        if format is None:
            tensors[name] = weights[short]
        else:
            matrix_name = short.removesuffix(".weight")
            if matrix_name not in leader and format.float_type is None:
                raise UnsupportedError(
                    f"quantize {name}: method {recipe} knows no input of this matrix; use --method rtn"
                )
            seen = statistics.get(leader.get(matrix_name, ""))
            started = time.perf_counter()
            # Plain floats have no codes to choose, and nothing is known of what a rare expert reads.
            known = format.float_type is None and (seen is not None or not recipe.method.method.calibrated)
            method = recipe.method if known else parse_method("rtn")
            try:
                matrix = method(weights[short], format, seen)
                tensors[name] = matrix = refine_rows(matrix, weights[short], rows.get(name, ()), format)
            except FormatError as error:
                raise FormatError(f"quantize {name}: {error}") from error
            report[name] = _error(matrix, weights[short], seen) | {"seconds": time.perf_counter() - started}
            if (expert := expert_of(short)[1]) in counts:
                report[name]["tokens"] = counts[expert]
            if seen is not None:
                report[name]["input_histogram"] = channel_histogram(seen.magnitudes)
        tell(name)
    return tensors, report


def _decoded(tensors: dict[str, PackedMatrix | np.ndarray], layer: int) -> dict[str, np.ndarray]:
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): tensor.dequantize()
        if isinstance(tensor, PackedMatrix)
        else np.array(tensor)
        for name, tensor in tensors.items()
    }


def _error(matrix: PackedMatrix, weight: np.ndarray, seen: Statistics | None) -> dict[str, Any]:
    """Shares of what was lost: of the weights' squares, and of the output's on the inputs seen."""
    rest = weight - matrix.dequantize()
    lost: dict[str, Any] = {"relative_squared_error": _ratio(np.vdot(rest, rest), np.vdot(weight, weight))}
    if seen is not None:
        output = np.vdot(weight @ seen.hessian, weight)
        lost["relative_output_error"] = _ratio(np.vdot(rest @ seen.hessian, rest), output)
    return lost


def _ratio(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else 0.0
