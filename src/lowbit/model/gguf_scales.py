"""Scales of whole tensors in a GGUF file: NVFP4 and BitNet weights come with one number beside them.

"X.scale", one F32 number or one for each expert, multiplies all weights of "X.weight". "X.input_scale" is
what another program would scale activations by before it rounds them; lowbit finds that from each input.
Source: the loading of weights in llama.cpp, llama-model.cpp.
"""

from __future__ import annotations

import numpy as np

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.gguf_file import GGUFFile
from lowbit.model.gguf_types import TENSOR_TYPES

_SCALE, _INPUT = ".scale", ".input_scale"


class TensorScales:
    """The scales of a file. names: the tensors that are scales of others, and no weights."""

    def __init__(self, file: GGUFFile):
        self.names: set[str] = set()
        self._scales: dict[str, np.ndarray] = {}
        for name, tensor in file.tensors.items():
            mark = next((mark for mark in (_INPUT, _SCALE) if name.endswith(mark)), None)
            weight = file.tensors.get(f"{name[: -len(mark)]}.weight") if mark else None
            if weight is None:
                continue
            self.names.add(name)
            if mark == _INPUT:
                continue
            count = int(np.prod(tensor.shape))
            experts = weight.shape[0] if len(weight.shape) == 3 else 1
            if TENSOR_TYPES[tensor.type].name != "F32" or count not in (1, experts):
                raise CheckpointError(
                    f"open {file.path}: {name} has {count} numbers of type {TENSOR_TYPES[tensor.type].name}; "
                    f"the scale of {weight.name} is 1{f' or {experts}' if experts > 1 else ''} of F32"
                )
            values = file.data(name).view("<f4").astype(np.float32)
            if not np.isfinite(values).all():
                raise CheckpointError(f"open {file.path}: {name} is not finite; the file is damaged")
            if TENSOR_TYPES[weight.type].float_type is not None and (values != 1).any():
                raise UnsupportedError(
                    f"open {file.path}: {name} scales {weight.name}, whose floats have no scales to "
                    "multiply; do it when the file is made"
                )
            self._scales[weight.name] = values

    def of(self, weight: str, expert: int | None = None) -> float:
        """The scale of tensor `weight`, or of one expert in it; 1 where it has none."""
        values = self._scales.get(weight)
        if values is None:
            return 1.0
        return float(values[expert if expert is not None and len(values) > 1 else 0])
