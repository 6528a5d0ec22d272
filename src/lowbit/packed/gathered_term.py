"""Codes over the inputs in an order of their own: GPTQ's act-order (g_idx), and groups that do not fit rows.

Weights that share a scale need not lie side by side in a file: with act-order (arXiv:2210.17323, `desc_act`)
the group of an input is looked up. Here they do, and the inputs are gathered into that order before they are
rounded, once for all matrices of a product that share it. Nothing is requantized.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed.term import check_array
from lowbit.packed.terms import CodeTerm

NO_INPUT = 0xFFFFFFFF
MAX_GATHERED = 1 << 28


@dataclass(frozen=True, eq=False)
class GatheredTerm:
    """A term of codes [out_features, k] whose input j is input inputs[j] of the matrix.

    inputs: uint32 [k]; no input twice; NO_INPUT: input j is 0 whatever the activations are (groups are filled
        up with it)
    codes: a term for a matrix of k inputs
    """

    kind: ClassVar[str] = "gathered"
    quantized: ClassVar[bool] = True
    inputs: np.ndarray
    codes: CodeTerm

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from self.codes.arrays()
        yield "inputs", self.inputs

    def numbers(self) -> Iterator[tuple[str, str, np.ndarray]]:
        yield from self.codes.numbers()

    def meta(self) -> dict[str, Any]:
        return self.codes.meta()

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> "GatheredTerm":
        inputs = arrays.pop("inputs")
        return cls(inputs, CodeTerm.from_meta(meta, arrays))

    def check(self, out_features: int, in_features: int) -> None:
        """Raise FormatError unless the inputs are different ones of this matrix and the codes fit them."""
        check_array("inputs", self.inputs, (np.uint32,), (self.inputs.size,))
        if not 0 < self.inputs.size <= MAX_GATHERED:
            raise FormatError(f"gathered: {self.inputs.size} inputs; there must be 1 to {MAX_GATHERED}")
        read = self.inputs[self.inputs != NO_INPUT]
        if int(read.max(initial=0)) >= in_features or len(np.unique(read)) < len(read):
            raise FormatError(
                f"gathered: inputs {read[:8].tolist()}{' ..' if read.size > 8 else ''}; they must be "
                f"different ones below {in_features}, or {NO_INPUT} for none"
            )
        self.codes.check(out_features, len(self.inputs))

    def gather(self, x: np.ndarray) -> np.ndarray:
        """Activations [tokens, in_features] as the codes read them, [tokens, k]."""
        gathered = np.zeros((len(x), len(self.inputs)), x.dtype)
        read = self.inputs != NO_INPUT
        gathered[:, read] = x[:, self.inputs[read]]
        return gathered

    def dequantize(self, out_features: int, in_features: int) -> np.ndarray:
        """float32 [out_features, in_features], zero for inputs that are not read."""
        weights = np.zeros((out_features, in_features), np.float32)
        read = self.inputs != NO_INPUT
        weights[:, self.inputs[read]] = self.codes.dequantize(out_features, len(self.inputs))[:, read]
        return weights

    def take_rows(self, index: np.ndarray, out_features: int, in_features: int) -> "GatheredTerm":
        return replace(self, codes=self.codes.take_rows(index, out_features, len(self.inputs)))

    def add_to(self, native: Any) -> None:
        from lowbit._native import Matrix

        part = Matrix(native.shape[0], len(self.inputs))
        self.codes.add_to(part)
        native.add_gathered_term(self.inputs, part)
