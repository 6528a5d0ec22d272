"""How much a model suffers when matrices take a format: measured, or estimated from one pass.

Damage is the Kullback-Leibler divergence from the output of the full-precision model to that of the changed
one, in nats per token. That of several changed matrices is nearly the sum of theirs, which is what makes
choosing a knapsack (allocate.py). With E the error of a weight [out, in], x its inputs and g the gradient of
the log-likelihood of labels drawn from the model with respect to its outputs, one row per position t:

    kl      measured: one item of the model quantized, everything else in full precision
    fisher  1/2 sum over outputs o of mean over windows of (sum over t of g_to (E x_t)_o)^2, per position: the
            divergence to second order, outputs taken as independent
    hawq    1/2 mean Hessian trace |E|^2, that trace being the mean of |g|^2 |x|^2: HAWQ-V3, arXiv:2011.10680
    output  mean of |E x|^2: the squared error of the layer's own output, as GPTQ has it; in no common unit
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lowbit.compress.blocks import Streams
from lowbit.compress.network import Network, Tensors
from lowbit.errors import FormatError
from lowbit.model.tensors import EMBEDDING, HEAD, POSITIONS, leaders
from lowbit.packed import planned_arrays

if TYPE_CHECKING:
    from lowbit.formats import Format
    from lowbit.model.checkpoint import Checkpoint
    from lowbit.packed import PackedMatrix
    from lowbit.quantize.statistics import Statistics

Quantize = Callable[[np.ndarray, "Format", "Statistics | None"], "PackedMatrix"]
Progress = Callable[[float, float, str], None]
LIVE_BYTES = 1 << 30  # of changed streams that run through the layers together


@dataclass(frozen=True)
class Item:
    """Matrices that take one format together.

    layer: number of their layer; None for token embedding and head
    names: without prefix and ".weight" in a layer; whole tensor names outside
    formats: among which they choose
    """

    layer: int | None
    names: tuple[str, ...]
    formats: tuple[Format, ...]

    @property
    def what(self) -> str:
        return ", ".join(self.names) if self.layer is None else f"layer {self.layer} {', '.join(self.names)}"

    @property
    def tensors(self) -> tuple[str, ...]:
        if self.layer is None:
            return self.names
        return tuple(f"model.layers.{self.layer}.{name}.weight" for name in self.names)


class Watched:
    """Statistics of layer after layer of the full-precision model; nothing where no method needs them."""

    def __init__(self, checkpoint: Checkpoint, tokens: np.ndarray | None):
        self._streams = None
        if tokens is not None:
            places = checkpoint.read(POSITIONS) if checkpoint.config.positions == "learned" else None
            self._streams = Streams(checkpoint.config, checkpoint.read(EMBEDDING), tokens, places)
        self._config = checkpoint.config

    def layer(self, layer: int, weights: Tensors) -> dict[str, Statistics]:
        """By the name of each matrix. Call it for every layer in order."""
        if self._streams is None:
            return {}
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        seen = self._streams.watch(layer, arrays)
        self._streams.advance(layer, arrays)
        known = leaders(self._config, layer).items()
        return {name: seen[leader] for name, leader in known if leader in seen}


def stored_bytes(item: Item, format: Format, checkpoint: Checkpoint) -> int | None:
    """What the item's matrices take in this format; None if a group size does not divide their inputs."""
    total = 0
    for name in item.tensors:
        out_features, in_features = checkpoint.shape(name)
        try:
            arrays = planned_arrays(format, out_features, in_features)
        except FormatError:
            return None
        total += sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape in arrays.values())
    return total


def measured(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    items: Sequence[Item],
    quantize: Quantize,
    statistics: np.ndarray | None = None,
    progress: Progress | None = None,
    live_bytes: int = LIVE_BYTES,
) -> np.ndarray:
    """Divergence of the output with one item in one format: float64 [items, formats], nats per token.

    tokens: int64 [windows, positions] on which it is measured
    items: in any order; where one has fewer formats than another, or a format does not fit, it is infinite
    statistics: int64 [windows, positions], calibration for `quantize`; None if it needs none
    progress: called as progress(done, total, what)
    live_bytes: layers whose changed streams take no more than this go through the later ones together, so
        that each layer is read once for all of them
    """
    model, watched = Network(checkpoint, tokens), Watched(checkpoint, statistics)
    scores = np.full((len(items), max(len(item.formats) for item in items)), np.inf)
    done, total = 0, sum(len(item.formats) for item in items)
    live: list[_Changed] = []

    def change(number: int, weights: Tensors, seen: dict[str, Statistics]) -> Iterator[tuple[int, Tensors]]:
        nonlocal done
        item = items[number]
        for f, format in enumerate(item.formats):
            if stored_bytes(item, format, checkpoint) is not None:
                yield f, _changed(item.names, weights, format, quantize, seen)
            done += 1
            if progress is not None:
                progress(done, total, f"{item.what} {format.name}")

    with torch.inference_mode():
        before = model.embed()
        outside = [number for number, item in enumerate(items) if item.layer is None]
        for span in _spans(items, model.config.n_layers, max(1, live_bytes // (4 * before.numel()))):
            clean, live = before, []
            for number in outside:
                weights = {name: torch.from_numpy(checkpoint.read(name)) for name in items[number].names}
                for f, changes in change(number, weights, {}):
                    x = model.embed(changes.get(EMBEDDING)) if EMBEDDING in changes else clean
                    head = changes.get(EMBEDDING if model.config.tied else HEAD)
                    live.append(_Changed(number, f, x, head))
            outside = []
            for layer in range(span.start, model.config.n_layers):
                weights = model.layer(layer)
                for changed in live:
                    changed.x = model.run(layer, weights, changed.x)
                if layer in span:
                    seen = watched.layer(layer, weights)
                    for number, item in enumerate(items):
                        if item.layer == layer:
                            for f, changes in change(number, weights, seen):
                                x = model.run(layer, {**weights, **changes}, clean)
                                live.append(_Changed(number, f, x, None))
                clean = model.run(layer, weights, clean)
                if layer + 1 == span.stop:
                    before = clean
            _score(model, clean, live, scores)
    return scores


@dataclass
class _Changed:
    """The stream of the model with item `number` in its format `format`; its head, if that changed."""

    number: int
    format: int
    x: torch.Tensor
    head: torch.Tensor | None


def _spans(items: Sequence[Item], layers: int, room: int) -> list[range]:
    """Consecutive layers of at most `room` changed streams together (or one layer)."""
    streams = [sum(len(item.formats) for item in items if item.layer == n) for n in range(layers)]
    spans = [range(1)]
    for layer in range(1, layers):
        if sum(streams[n] for n in spans[-1]) + streams[layer] <= room:
            spans[-1] = range(spans[-1].start, layer + 1)
        else:
            spans.append(range(layer, layer + 1))
    return spans


def _changed(
    names: tuple[str, ...], weights: Tensors, format: Format, quantize: Quantize, seen: dict[str, Statistics]
) -> Tensors:
    """The named matrices as they come back from `format`, under the names that they have in `weights`."""
    changes = {}
    for name in names:
        key = name if name in weights else f"{name}.weight"
        matrix = quantize(weights[key].numpy(), format, seen.get(name))
        changes[key] = torch.from_numpy(matrix.dequantize())
    return changes


def _score(model: Network, clean: torch.Tensor, live: list[_Changed], scores: np.ndarray) -> None:
    """Fill in the mean divergence from the clean output of every changed stream."""
    head = model.head()
    sums = np.zeros(len(live))
    for window in range(len(clean)):
        wanted = model.logits(head, clean[window]).log_softmax(-1)
        for i, changed in enumerate(live):
            given = model.logits(head if changed.head is None else changed.head, changed.x[window])
            sums[i] += divergence(wanted, given.log_softmax(-1))
    for changed, total in zip(live, sums):
        scores[changed.number, changed.format] = max(total / len(clean), 0.0)


def divergence(wanted: torch.Tensor, given: torch.Tensor) -> float:
    """Mean over positions of KL(wanted, given) in nats; both log-probabilities [positions, vocab]."""
    return float((wanted.exp() * (wanted - given)).sum(-1, dtype=torch.float64).mean())


def together(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    items: Sequence[Item],
    chosen: Sequence[int],
    quantize: Quantize,
    statistics: np.ndarray | None = None,
) -> float:
    """Divergence of the output with every item in its chosen format: what the sum of `measured` predicts."""
    model, watched = Network(checkpoint, tokens), Watched(checkpoint, statistics)
    with torch.inference_mode():
        outside: Tensors = {}
        for item, f in zip(items, chosen):
            if item.layer is None:
                weights = {name: torch.from_numpy(checkpoint.read(name)) for name in item.names}
                outside |= _changed(item.names, weights, item.formats[f], quantize, {})
        clean = model.embed()
        x = model.embed(outside.get(EMBEDDING))
        for layer in range(model.config.n_layers):
            weights = model.layer(layer)
            clean = model.run(layer, weights, clean)
            seen = watched.layer(layer, weights)
            for item, f in zip(items, chosen):
                if item.layer == layer:
                    weights |= _changed(item.names, weights, item.formats[f], quantize, seen)
            x = model.run(layer, weights, x)
        score = np.zeros((1, 1))
        head = outside.get(EMBEDDING if model.config.tied else HEAD)
        _score(model, clean, [_Changed(0, 0, x, head)], score)
    return float(score[0, 0])


def estimated(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    items: Sequence[Item],
    quantize: Quantize,
    kind: str,
    progress: Progress | None = None,
) -> np.ndarray:
    """The estimate "fisher", "hawq" or "output" for items of layers, float64 [items, formats].

    tokens: int64 [windows, positions] for inputs and gradients
    quantize: a method that needs no statistics
    """
    model = Network(checkpoint, tokens)
    scores = np.zeros((len(items), max(len(item.formats) for item in items)))
    places = {(item.layer, name): number for number, item in enumerate(items) for name in item.names}
    for number, item in enumerate(items):
        fits = [stored_bytes(item, format, checkpoint) is not None for format in item.formats]
        scores[number, ~np.array(fits + [False] * (scores.shape[1] - len(fits)))] = np.inf
    done, total = 0, sum(len(item.names) for item in items if item.layer is not None)
    visited: set[int] = set()

    def visit(
        layer: int, name: str, weight: torch.Tensor, inputs: list[torch.Tensor], gradient: list[torch.Tensor]
    ) -> None:
        nonlocal done
        number = places.get((layer, name))
        if number is None:
            return
        visited.add(number)
        usable = [f for f in range(len(items[number].formats)) if np.isfinite(scores[number, f])]
        rounded = [quantize(weight.numpy(), items[number].formats[f], None).dequantize() for f in usable]
        errors = [torch.from_numpy(values) - weight for values in rounded]
        scores[number, usable] += ESTIMATES[kind](errors, inputs, gradient, tokens.size)
        done += 1
        if progress is not None:
            progress(done, total, f"layer {layer} {name}")

    model.backward(visit, "model")
    _fill_unseen(scores, items, visited)
    return scores


def _fill_unseen(scores: np.ndarray, items: Sequence[Item], visited: set[int]) -> None:
    """Experts to which no token came count as the mean of those of their layer that were seen."""

    def kind(item: Item) -> tuple[int | None, tuple[str, ...]]:
        return item.layer, tuple(re.sub(r"experts\.\d+", "experts", name) for name in item.names)

    for number, item in enumerate(items):
        if number in visited or item.layer is None:
            continue
        alike = [other for other in visited if kind(items[other]) == kind(item)]
        if alike:
            scores[number] = np.where(np.isinf(scores[number]), np.inf, scores[alike].mean(axis=0))


Parts = list[torch.Tensor]  # of each window, the rows that the matrix read


def _fisher(errors: list[torch.Tensor], inputs: Parts, gradient: Parts, tokens: int) -> list[float]:
    """The sum over t of g_to (E x_t)_o is that of (g^T x)_oi E_oi over i: one product for all formats."""
    squares = [0.0] * len(errors)
    for x, g in zip(inputs, gradient):
        slope = g.T @ x
        for f, error in enumerate(errors):
            squares[f] += _square_sum(torch.linalg.vecdot(slope, error))
    return [0.5 * total / tokens for total in squares]


def _hawq(errors: list[torch.Tensor], inputs: Parts, gradient: Parts, tokens: int) -> list[float]:
    read = sum(map(len, inputs))  # by an expert, fewer than there are tokens
    trace = sum(map(_square_sum, inputs)) / read * (sum(map(_square_sum, gradient)) / tokens)
    return [0.5 * _square_sum(error) * trace / error.numel() for error in errors]


def _output(errors: list[torch.Tensor], inputs: Parts, gradient: Parts, tokens: int) -> list[float]:
    return [sum(_square_sum(x @ error.T) for x in inputs) / tokens for error in errors]


def _square_sum(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


# (errors in each format [out, in], inputs [rows, in] of each window, gradients of outputs [rows, out], tokens
# of all windows) -> damage by each
ESTIMATES: dict[str, Callable[[list[torch.Tensor], Parts, Parts, int], list[float]]] = {
    "fisher": _fisher,
    "hawq": _hawq,
    "output": _output,
}
