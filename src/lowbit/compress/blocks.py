"""Quantize a checkpoint layer by layer, watching what flows into each matrix.

Calibration windows run through the model one layer at a time. A layer first runs with its own weights while
the Hessian of each matrix (the sum of x x^T over its inputs) is taken; its matrices are quantized; then it
runs again with what they have become, so that later layers see the errors of earlier ones. One layer's
weights and the residual streams of all windows are in memory, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from lowbit.errors import CheckpointError
from lowbit.model import torch_executor as executor
from lowbit.model.families import EMBEDDING
from lowbit.quantize.statistics import Statistics

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint
    from lowbit.packed import PackedMatrix

BATCH_TOKENS = 4096  # positions that run through a layer at a time


# (tensor name, weight float32 [out, in], statistics of its input) -> the quantized matrix
Quantizer = Callable[[str, np.ndarray, Statistics], "PackedMatrix"]


def walk_blocks(
    checkpoint: Checkpoint, tokens: np.ndarray, quantize: Quantizer
) -> Iterator[tuple[str, PackedMatrix]]:
    """Yield (tensor name, matrix) for every matrix of every layer, in order of use.

    tokens: int64 [windows, positions]
    Embedding and head are not part of any layer and are left to the caller.
    """
    config = checkpoint.config
    present = set(checkpoint.names())
    turn = executor.rotation(config, tokens.shape[1])
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    with torch.inference_mode():
        embedding = torch.from_numpy(checkpoint.read(EMBEDDING))
        streams = [executor.embed(embedding, part) for part in torch.from_numpy(tokens).split(rows)]
        del embedding
        for layer in range(config.n_layers):
            prefix = f"model.layers.{layer}."
            weights = {
                name.removeprefix(prefix): torch.from_numpy(checkpoint.read(name))
                for name in sorted(present)
                if name.startswith(prefix)
            }
            statistics = _watch(config, layer, weights, streams, turn)
            for group in executor.GROUPS:
                seen = statistics.pop(group[0])
                for name in group:
                    matrix = quantize(f"{prefix}{name}.weight", weights[f"{name}.weight"].numpy(), seen)
                    weights[f"{name}.weight"] = torch.from_numpy(matrix.dequantize())
                    yield f"{prefix}{name}.weight", matrix
            if layer + 1 < config.n_layers:
                for i, x in enumerate(streams):
                    streams[i] = executor.block(config, layer, weights, x, turn)


def _watch(
    config: executor.ModelConfig,
    layer: int,
    weights: dict[str, torch.Tensor],
    streams: list[torch.Tensor],
    turn: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, Statistics]:
    """Statistics of the input of each group of matrices, under the name of its first."""
    sums: dict[str, torch.Tensor] = {}
    largest: dict[str, torch.Tensor] = {}
    leaders = {group[0] for group in executor.GROUPS}
    count = sum(x.shape[0] * x.shape[1] for x in streams)

    def take(name: str, x: torch.Tensor) -> None:
        if name not in leaders:
            return
        flat = x.reshape(-1, x.shape[-1])
        peak = flat.abs().amax(0)
        if name not in sums:
            sums[name] = torch.zeros(flat.shape[1], flat.shape[1])
            largest[name] = peak
        sums[name].addmm_(flat.T, flat)
        largest[name] = torch.maximum(largest[name], peak)

    for x in streams:
        executor.block(config, layer, weights, x, turn, take)
    statistics = {}
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise CheckpointError(
                f"calibrate: inputs of layer {layer} {name} are not finite; the checkpoint is damaged or "
                "overflows in float32"
            )
        statistics[name] = Statistics((total / count).numpy(), largest[name].numpy(), count)
    return statistics
