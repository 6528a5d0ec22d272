"""Which output features of a whole model deserve more bits: MixLLM's global ranking (arXiv:2412.14590).

With g the gradient of a window's loss with respect to a row of weights and d what quantizing does to that
row, the loss changes by about g d + (g d)^2 / 2, the second term with the Hessian taken as g g^T. A row's
salience is the sum of that change's magnitude over windows. The rows of all matrices are ranked together, so
a layer that matters has many of them and another none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from lowbit.compress.network import Network
from lowbit.errors import RequestError

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint
    from lowbit.packed import PackedMatrix

# (tensor name, weight float32 [out, in]) -> the matrix of few bits; None: it keeps all of them
Coarse = Callable[[str, np.ndarray], "PackedMatrix | None"]


def salience(checkpoint: Checkpoint, tokens: np.ndarray, quantize: Coarse) -> dict[str, np.ndarray]:
    """Tensor name -> float64 [out_features] for every matrix of the layers that is quantized.

    tokens: int64 [windows, positions]; the loss is the mean cross-entropy of a window's next tokens
    """
    found: dict[str, np.ndarray] = {}

    def visit(
        layer: int, name: str, weight: torch.Tensor, inputs: list[torch.Tensor], gradient: list[torch.Tensor]
    ) -> None:
        tensor = f"model.layers.{layer}.{name}.weight"
        matrix = quantize(tensor, weight.numpy())
        if matrix is None:
            return
        change = torch.from_numpy(matrix.dequantize()) - weight
        # g = sum over positions of gradient x input^T, so g d needs the changed outputs only.
        moved = torch.stack(
            [(g * (x @ change.T)).sum(0, dtype=torch.float64) for x, g in zip(inputs, gradient)]
        )
        found[tensor] = (moved + moved.square() / 2).abs().sum(0).numpy()

    Network(checkpoint, tokens).backward(visit, "text")
    return found


def salient_rows(found: dict[str, np.ndarray], fraction: float = 0.1) -> dict[str, np.ndarray]:
    """Tensor name -> rows, ascending: the `fraction` of all rows of all matrices with most salience."""
    if not 0 <= fraction <= 1:
        raise RequestError(f"salient_rows: fraction={fraction}; give 0 to 1 (usual: 0.1)")
    if not found:
        return {}
    names = sorted(found)
    values = np.concatenate([found[name] for name in names])
    owner = np.repeat(np.arange(len(names)), [len(found[name]) for name in names])
    row = np.concatenate([np.arange(len(found[name])) for name in names])
    top = np.argsort(-values, kind="stable")[: int(fraction * len(values))]
    return {name: np.sort(row[top[owner[top] == number]]) for number, name in enumerate(names)}
