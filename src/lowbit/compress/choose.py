"""An Auto becomes a Scheme: measure what each format does to each matrix, then choose under the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.compress.allocate import Allocation, allocate
from lowbit.errors import FormatError, RequestError
from lowbit.formats import Format, Scheme
from lowbit.formats.auto import Auto
from lowbit.formats.scheme import stays_float
from lowbit.model.tensors import EMBEDDING, HEAD, ROUTER, groups
from lowbit.packed import PackedMatrix
from lowbit.quantize.methods import Choice, parse_method
from lowbit.quantize.statistics import Statistics

if TYPE_CHECKING:
    from lowbit.compress.sensitivity import Item
    from lowbit.model.checkpoint import Checkpoint

Progress = Callable[[float, float, str], None]


def resolve_auto(
    auto: Auto,
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    method: Choice | str = "rtn",
    progress: Progress | None = None,
) -> tuple[Scheme, dict[str, Any]]:
    """The Scheme of least damage within the budget, and how it was found.

    checkpoint: in full precision, after folds that need only weights (views.py)
    tokens: int64 [windows, positions], the calibration; damage is measured on its first `auto.samples`
    method: how matrices will be rounded. "kl" measures with it; estimates round to nearest, which ranks alike
    progress: called as progress(done, total, what)

    Returns (scheme, {"bits_per_weight" of the layers' matrices, "bytes" of all tensors, "seconds" of the
    products of one token (0 without a limit), "optimal", "sensitivity": its name, "predicted_kl": sum of the
    chosen sensitivities, or None where they are not in nats, "achieved_kl": measured with all at once,
    on the same windows and rounded alike, "items": [{"tensors", "format", "sensitivity": {format: value},
    "bytes": {format: value}}]}).
    Raises FormatError, before anything is measured, if no choice meets the budget; it names the nearest that
    can be met.
    """
    from lowbit.compress import sensitivity

    choice = parse_method(method) if isinstance(method, str) else method
    items = _items(auto, checkpoint)
    sizes, fits = _sizes(items, checkpoint)
    rest = _other_bytes(checkpoint, items, auto)
    budget = _budget(auto, checkpoint, items, sizes, fits, rest)
    seconds = _seconds(auto, checkpoint, items, sizes, fits)
    few = tokens[: auto.samples]
    plain = parse_method("rtn")

    def quantize(weight: np.ndarray, format: Format, seen: Statistics | None) -> PackedMatrix:
        # Floats have no codes to choose, and nothing is known of what embedding and head read.
        known = format.float_type is None and (seen is not None or not choice.method.calibrated)
        return (choice if known else plain)(weight, format, seen)

    measure = auto.sensitivity == "kl"
    rounded = quantize if measure else plain
    calibration = tokens if measure and choice.method.calibrated else None
    if measure:
        scores = sensitivity.measured(checkpoint, few, items, quantize, calibration, progress)
    else:
        scores = sensitivity.estimated(checkpoint, few, items, plain, auto.sensitivity, progress)
        outside = [row for row, item in enumerate(items) if item.layer is None]
        if outside:
            part = [items[row] for row in outside]
            values = sensitivity.measured(checkpoint, few, part, plain, None, progress)
            scores[outside, : values.shape[1]] = values
    scores[~fits] = np.inf
    found = allocate(scores, sizes, budget, seconds, auto.seconds)
    achieved = sensitivity.together(checkpoint, few, items, found.chosen, rounded, calibration)
    scheme = _scheme(auto, checkpoint, items, found)
    return scheme, _report(auto, checkpoint, items, scores, sizes, fits, found, rest, achieved)


def _items(auto: Auto, checkpoint: Checkpoint) -> list[Item]:
    """What chooses, in order: matrices of the layers, then embedding and head if their format is open."""
    from lowbit.compress.sensitivity import Item

    names = checkpoint.names()
    have = set(names)
    items = []
    for layer in range(checkpoint.config.n_layers):
        parts = [
            tuple(name for name in group if f"model.layers.{layer}.{name}.weight" in have)
            for group in groups(checkpoint.config, layer)
            if group != (ROUTER,)
        ]
        if auto.together == "matrix":
            parts = [(name,) for part in parts for name in part]
        elif auto.together == "layer":
            parts = [tuple(name for part in parts for name in part)]
        items += [Item(layer, part, auto.formats) for part in parts if part]
    known = {tensor for item in items for tensor in item.tensors} | {EMBEDDING, HEAD}
    for name in names:
        if len(checkpoint.shape(name)) == 2 and name not in known and not stays_float(name):
            raise RequestError(f"auto: nothing is known of what {name} reads; give a Scheme instead")
    if len(auto.embedding_formats) > 1:
        items += [Item(None, (name,), auto.embedding_formats) for name in (EMBEDDING, HEAD) if name in have]
    return items


def _sizes(items: list[Item], checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """(bytes int64 [items, formats], bool: the format exists for the item and fits)."""
    from lowbit.compress.sensitivity import stored_bytes

    sizes = np.zeros((len(items), max(len(item.formats) for item in items)), np.int64)
    fits = np.zeros(sizes.shape, bool)
    for row, item in enumerate(items):
        for column, format in enumerate(item.formats):
            size = stored_bytes(item, format, checkpoint)
            if size is not None:
                sizes[row, column], fits[row, column] = size, True
        if not fits[row].any():
            raise FormatError(
                f"auto: none of {', '.join(f.name for f in item.formats)} fits {item.tensors[0]} "
                f"{list(checkpoint.shape(item.tensors[0]))}; add one whose group divides its inputs, such as "
                "int4-g16 or int4-row"
            )
    return sizes, fits


def _other_bytes(checkpoint: Checkpoint, items: list[Item], auto: Auto) -> int:
    """What every tensor that does not choose takes: float32 vectors, embedding and head of a given format."""
    from lowbit.compress.sensitivity import Item, stored_bytes

    chosen = {tensor for item in items for tensor in item.tensors}
    total = 0
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        if len(shape) != 2:
            total += 4 * int(np.prod(shape))
        elif name not in chosen:
            format = Format.plain("fp16") if stays_float(name) else auto.embedding_formats[0]
            size = stored_bytes(Item(None, (name,), (format,)), format, checkpoint)
            if size is None:
                raise FormatError(
                    f"auto: embedding format {format.name} does not fit {name} {list(shape)}; give another"
                )
            total += size
    return total


def _budget(
    auto: Auto, checkpoint: Checkpoint, items: list[Item], sizes: np.ndarray, fits: np.ndarray, rest: int
) -> int:
    """Bytes for the items. Raises FormatError that names the nearest budget if they cannot be met."""
    least = int(np.where(fits, sizes, np.iinfo(np.int64).max).min(axis=1).sum())
    if auto.bits is not None:
        weights = _weights(checkpoint, items)
        budget = int(auto.bits * weights / 8)
        if least > budget:
            raise FormatError(
                f"auto: bits={auto.bits:g} per weight, and the smallest choices take "
                f"{8 * least / weights:.4f}; give --bits {_up(8 * least / weights)} or smaller formats"
            )
        return budget
    assert isinstance(auto.bytes, int)
    if least + rest > auto.bytes:
        raise FormatError(
            f"auto: bytes={auto.bytes}, and the smallest choices take {least + rest} ({rest} of them for "
            f"tensors that do not choose); give --bytes {least + rest}, smaller formats or another embedding"
        )
    return auto.bytes - rest


def _up(bits: float) -> str:
    return f"{np.ceil(bits * 1000) / 1000:.3f}"


def _weights(checkpoint: Checkpoint, items: list[Item]) -> int:
    """Weights of the layers' matrices."""
    tensors = (tensor for item in items if item.layer is not None for tensor in item.tensors)
    return sum(int(np.prod(checkpoint.shape(tensor))) for tensor in tensors)


def _seconds(
    auto: Auto, checkpoint: Checkpoint, items: list[Item], sizes: np.ndarray, fits: np.ndarray
) -> np.ndarray | None:
    """float64 [items, formats] from the table, or None if they are not limited."""
    if auto.timings is None:
        return None
    seconds = np.zeros(sizes.shape)
    for row, item in enumerate(items):
        for column, format in enumerate(item.formats):
            for tensor in item.tensors if fits[row, column] else ():
                out_features, in_features = checkpoint.shape(tensor)
                name, key = format.name, (format.name, out_features, in_features)
                if key not in auto.timings:
                    shape = f"{out_features}x{in_features}"
                    raise RequestError(
                        f"auto: timings have no product of {name} {shape}; measure it: "
                        f"lowbit bench kernels --formats {name} --shapes {shape} --batch 1"
                    )
                seconds[row, column] += auto.timings[key]
    return seconds


def _scheme(auto: Auto, checkpoint: Checkpoint, items: list[Item], found: Allocation) -> Scheme:
    """The most frequent format for all, the others by name."""
    formats: dict[str, Format] = {}
    weights: dict[Format, int] = {}
    for item, number in zip(items, found.chosen):
        for tensor in item.tensors:
            formats[tensor] = format = item.formats[number]
            if item.layer is not None:
                weights[format] = weights.get(format, 0) + int(np.prod(checkpoint.shape(tensor)))
    usual = max(weights, key=lambda f: weights[f])
    return auto.scheme(usual, {t: f for t, f in formats.items() if f != usual or t in (EMBEDDING, HEAD)})


def _report(
    auto: Auto,
    checkpoint: Checkpoint,
    items: list[Item],
    scores: np.ndarray,
    sizes: np.ndarray,
    fits: np.ndarray,
    found: Allocation,
    rest: int,
    achieved: float,
) -> dict[str, Any]:
    rows = []
    inside = 0
    for row, item in enumerate(items):
        usable = [column for column in range(len(item.formats)) if fits[row, column]]
        rows.append(
            {
                "tensors": list(item.tensors),
                "format": item.formats[found.chosen[row]].name,
                "sensitivity": {item.formats[c].name: float(scores[row, c]) for c in usable},
                "bytes": {item.formats[c].name: int(sizes[row, c]) for c in usable},
            }
        )
        inside += int(sizes[row, found.chosen[row]]) if item.layer is not None else 0
    return {
        "bits_per_weight": 8 * inside / _weights(checkpoint, items),
        "bytes": found.size + rest,
        "seconds": found.seconds,
        "optimal": found.optimal,
        "sensitivity": auto.sensitivity,
        "predicted_kl": None if auto.sensitivity == "output" else found.sensitivity,
        "achieved_kl": achieved,
        "items": rows,
    }
