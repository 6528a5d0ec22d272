"""Calibration windows that run through a model one layer at a time, watched at the input of every matrix."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

# Torch's threads would spin between their turns, on the cores of those that multiply: a third of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

from lowbit.errors import CheckpointError
from lowbit.model import torch_executor as executor
from lowbit.model.tensors import EMBEDDING, POSITIONS, groups, leaders
from lowbit.packed import FloatTerm, PackedMatrix, pack_values
from lowbit.quantize.statistics import Statistics

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint
    from lowbit.model.config import ModelConfig

BATCH_TOKENS = 2048  # positions that run through a layer at a time
Weights = Mapping[str, np.ndarray]  # float32 tensors of one layer, names without `model.layers.N.`


class Streams:
    """The residual streams of all windows: float32 [batch, positions, hidden] in batches, before one layer.

    embedding: float32 [vocab, hidden]
    tokens: int64 [windows, positions]
    positions: the table of a network with learned positions, float32 [rows, hidden]
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: np.ndarray,
        tokens: np.ndarray,
        positions: np.ndarray | None = None,
    ):
        self._config = config
        self._turn = executor.rotation(config, tokens.shape[1])
        rows = max(1, BATCH_TOKENS // tokens.shape[1])
        table, places = (
            torch.from_numpy(embedding),
            None if positions is None else torch.from_numpy(positions),
        )
        self._streams = [
            executor.embed(config, table, part, places) for part in torch.from_numpy(tokens).split(rows)
        ]

    def watch(self, layer: int, weights: Weights) -> dict[str, Statistics]:
        """Statistics of the input of each group, under the name of its first matrix."""
        sums: dict[str, np.ndarray] = {}
        largest: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}
        watched = set(leaders(self._config, layer).values())

        def take(name: str, x: torch.Tensor) -> None:
            if name not in watched or not x.numel():
                return
            flat = x.reshape(-1, x.shape[-1])
            peak = flat.abs().amax(0)
            values = flat.numpy()
            counts[name] = counts.get(name, 0) + len(values)
            if name in sums:
                sums[name] += values.T @ values  # half the work of torch's: BLAS sees that it is symmetric
                largest[name] = torch.maximum(largest[name], peak)
            else:
                sums[name], largest[name] = values.T @ values, peak

        tensors, multiply = _tensors(weights), _product(weights)

        def product(name: str, x: torch.Tensor) -> torch.Tensor:
            if name.startswith("mlp.") and name.endswith("down_proj"):  # nobody looks at the layer's output
                return x.new_zeros(*x.shape[:-1], self._config.hidden_size)
            return multiply(name, x)

        with torch.inference_mode():
            for x in self._streams:
                executor.block(self._config, layer, tensors, x, self._turn, take, product=product)
        statistics = {}
        for name, total in sums.items():
            if not np.isfinite(total).all():
                raise CheckpointError(
                    f"calibrate: inputs of layer {layer} {name} are not finite; the checkpoint is damaged or "
                    "overflows in float32"
                )
            statistics[name] = Statistics(
                total / np.float32(counts[name]), largest[name].numpy(), counts[name]
            )
        return statistics

    def advance(self, layer: int, weights: Weights) -> None:
        """Run the windows through the layer."""
        tensors, product = _tensors(weights), _product(weights)
        with torch.inference_mode():
            for i, x in enumerate(self._streams):
                self._streams[i] = executor.block(
                    self._config, layer, tensors, x, self._turn, product=product
                )


# (tensor name, weight float32 [out, in], statistics of its input, None of an expert to which no token came)
# -> the quantized matrix
Quantizer = Callable[[str, np.ndarray, Statistics | None], PackedMatrix]


def walk_blocks(
    checkpoint: Checkpoint, tokens: np.ndarray, quantize: Quantizer
) -> Iterator[tuple[str, PackedMatrix]]:
    """Yield (tensor name, matrix) for every matrix of every layer, in order of use.

    tokens: int64 [windows, positions]
    A layer is watched with its own weights and then run as it has become, so that later layers see the errors
    of earlier ones. Embedding and head are left to the caller.
    """
    config = checkpoint.config
    present = sorted(checkpoint.names())
    places = checkpoint.read(POSITIONS) if POSITIONS in present else None
    streams = Streams(config, checkpoint.read(EMBEDDING), tokens, places)
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}."
        weights = {n.removeprefix(prefix): checkpoint.read(n) for n in present if n.startswith(prefix)}
        statistics = streams.watch(layer, weights)
        for group in groups(config, layer):
            seen = statistics.pop(group[0], None)
            for name in group:
                matrix = quantize(f"{prefix}{name}.weight", weights[f"{name}.weight"], seen)
                weights[f"{name}.weight"] = matrix.dequantize()
                yield f"{prefix}{name}.weight", matrix
        if layer + 1 < config.n_layers:
            streams.advance(layer, weights)


def _tensors(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in weights.items()}


def _product(weights: Weights) -> executor.Product:
    """Products by the native float kernels, which are three times as fast as torch's on some machines."""
    from lowbit import _native

    packed = {
        name.removesuffix(".weight"): PackedMatrix(
            array.shape[0], array.shape[1], (FloatTerm("fp32", pack_values(array)),)
        )
        for name, array in weights.items()
        if array.ndim == 2
    }

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        rows = np.ascontiguousarray(x.numpy().reshape(-1, x.shape[-1]))
        result = _native.matmul(rows, packed[name].native(), 8)
        return torch.from_numpy(result).reshape(*x.shape[:-1], -1)

    return product
