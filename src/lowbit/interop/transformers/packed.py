"""A PackedMatrix as a torch module: its arrays are buffers that share its memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.packed import PackedMatrix


class PackedTensor(nn.Module):
    """Buffers `0.codes`, `0.scales` .. of the terms, as a lowbit file names them.

    They count in get_memory_footprint and go with state_dict, but keep their types and stay on the CPU: `to`
    with a dtype leaves them, `to` with another device raises.
    """

    def __init__(self, matrix: PackedMatrix):
        super().__init__()
        self.meta, arrays = matrix.state()
        self._matrix: PackedMatrix | None = matrix
        for name, array in arrays.items():
            number, field = name.split(".", 1)
            if number not in self._modules:
                self.add_module(number, _Term())
            self._modules[number].register_buffer(field, as_tensor(array))  # type: ignore[union-attr]

    @property
    def matrix(self) -> PackedMatrix:
        """The matrix over the buffers' memory."""
        if self._matrix is None:
            arrays = {
                f"{number}.{field}": tensor.numpy()
                for number, term in self._modules.items()
                if term is not None
                for field, tensor in term._buffers.items()
                if tensor is not None
            }
            self._matrix = PackedMatrix.from_state(self.meta, arrays)
        return self._matrix

    def extra_repr(self) -> str:
        m = self.matrix
        return (
            f"{m.out_features} x {m.in_features}, {m.format_name or 'unnamed'}, {m.bits_per_weight:.2f} bits"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedTensor:
        check_device(fn(torch.empty(0)).device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._matrix = None  # the terms below take other arrays
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the native matrix out: it points into this object's memory."""
        return {**self.__dict__, "_matrix": None}


class _Term(nn.Module):
    """The arrays of one term. A state dict replaces them: they may lie in a mapped file, read-only."""

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, old in self._buffers.items():
            new = state_dict.get(prefix + name)
            if new is None or old is None:
                missing_keys.append(prefix + name)
            elif new.shape != old.shape or new.dtype != old.dtype:
                error_msgs.append(
                    f"{prefix}{name}: {new.dtype} {list(new.shape)}, required {old.dtype} {list(old.shape)}"
                )
            else:
                check_device(new.device)
                self._buffers[name] = new.detach().contiguous().clone()


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor over the same memory; one from a mapped file must not be written to."""
    array = np.ascontiguousarray(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A float tensor as float32; bfloat16 has no NumPy type."""
    tensor = tensor.detach()
    if tensor.device.type == "meta":
        raise CheckpointError("quantize: a weight is on the meta device; load the model before quantizing it")
    return tensor.to("cpu", torch.float32).contiguous().numpy()


def check_device(device: torch.device) -> None:
    if device.type != "cpu":
        raise UnsupportedError(
            f"to({device}): lowbit's kernels in transformers run on the CPU; leave the model there "
            "(device_map=None), or dequantize it first: model.dequantize()"
        )
