"""Linear and embedding modules of torch over packed weights, multiplied by lowbit's kernels.

A module may hold several matrices: checkpoints store queries, keys and values as one (Phi-3, GPT-2), lowbit
keeps them apart, and here they go through one native call that quantizes the activations once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit.errors import UnsupportedError
from lowbit.interop.transformers.packed import PackedTensor, check_device
from lowbit.kernels import ACTIVATION_BITS
from lowbit.packed import PackedMatrix


class PackedLinear(nn.Module):
    """y = x W^T + bias with W in packed parts, x rounded to integers as the scheme says.

    parts: one under each other they are W, unless `order` says where each row goes
    names: of the parts in a lowbit directory
    activations: "int8" or "int16"
    order: int64 [out_features]: row r of W is row order[r] of the parts; None: as they come
    bias: Parameter [out_features] or None

    Float32 inputs are read and results returned without a copy; bfloat16 and float16 are converted. Gradients
    pass to the input as if it had not been rounded; weights have none.
    """

    def __init__(
        self,
        parts: Sequence[PackedTensor],
        names: Sequence[str],
        activations: str = "int8",
        order: np.ndarray | None = None,
        bias: nn.Parameter | None = None,
    ):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.names = tuple(names)
        self.activations = activations
        self.order = None if order is None else np.ascontiguousarray(order, np.int64)
        shapes = [part.matrix.shape for part in parts]
        self.in_features = shapes[0][1]
        self.out_features = sum(shape[0] for shape in shapes)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = multiply(x, self)
        if self.bias is not None:
            y = y + self.bias.to(torch.float32)
        return y.to(x.dtype)

    def matrices(self) -> list[PackedMatrix]:
        return [part.matrix for part in self.parts if isinstance(part, PackedTensor)]

    def dequantize(self) -> torch.Tensor:
        """float32 [out_features, in_features], as the kernels see the weights."""
        weight = np.concatenate([matrix.dequantize() for matrix in self.matrices()])
        return torch.from_numpy(weight if self.order is None else weight[self.order])

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in={self.in_features}, out={self.out_features}, {self.activations}, bias={bias}"


class PackedEmbedding(nn.Module):
    """Rows of packed weights, decoded when they are looked up.

    scale: multiplies them (Gemma); dtype: of the result
    """

    def __init__(self, packed: PackedTensor, name: str, dtype: torch.dtype, scale: float | None = None):
        super().__init__()
        self.parts = nn.ModuleList([packed])
        self.names = (name,)
        self.scale = scale
        self.kind: torch.Tensor
        self.register_buffer("kind", torch.empty(0, dtype=dtype), persistent=False)  # follows model.to(dtype)
        self.num_embeddings = packed.matrix.out_features
        self.embedding_dim = packed.matrix.in_features

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        check_device(ids.device)
        rows = _decode(ids.reshape(-1).to(torch.int64).contiguous(), self.matrices()[0])
        rows = rows.view(*ids.shape, self.embedding_dim).to(self.kind.dtype)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype)

    def matrices(self) -> list[PackedMatrix]:
        return [part.matrix for part in self.parts if isinstance(part, PackedTensor)]

    def dequantize(self) -> torch.Tensor:
        return torch.from_numpy(self.matrices()[0].dequantize())

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def multiply(x: torch.Tensor, linear: PackedLinear) -> torch.Tensor:
    """x [.., in_features] of any float type; float32 [.., out_features]."""
    check_device(x.device)
    if not x.dtype.is_floating_point:
        raise UnsupportedError(f"PackedLinear: the input is {x.dtype}; give float32, bfloat16 or float16")
    if x.shape[-1:] != (linear.in_features,):
        raise UnsupportedError(
            f"PackedLinear: the input has shape {list(x.shape)}; required [.., {linear.in_features}]"
        )
    flat = x.reshape(-1, linear.in_features).to(torch.float32)
    if torch.is_grad_enabled() and x.requires_grad:
        y = _Product.apply(flat, linear)
    else:
        y = _product(flat, linear)
    return y.view(*x.shape[:-1], linear.out_features)


@torch.compiler.disable
def _product(flat: torch.Tensor, linear: PackedLinear) -> torch.Tensor:
    from lowbit import _native

    values = flat.detach().contiguous().numpy()
    bits = ACTIVATION_BITS[linear.activations]
    y = torch.from_numpy(_native.matmul_group(values, [m.native() for m in linear.matrices()], bits))
    return y if linear.order is None else y[:, torch.from_numpy(linear.order)]


@torch.compiler.disable
def _decode(ids: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    from lowbit import _native

    return torch.from_numpy(_native.dequantize_rows(matrix.native(), ids.numpy()))


class _Product(torch.autograd.Function):
    """The product for autograd. Its derivative is that of x W^T: rounding x is passed through."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, linear: PackedLinear) -> torch.Tensor:
        ctx.linear = linear
        return _product(flat, linear)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.linear.dequantize(), None
