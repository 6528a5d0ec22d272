"""BitNet checkpoints of transformers: ternary codes, four to a byte along the output, one scale for a matrix.

Written for AutoBitLinear ("autobitlinear", "offline"), which multiplies by weight_scale; BitLinear divides by
it, and the reciprocal of a scale is seldom a number of the file. Layout: model/stored/bitnet.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import RequestError
from lowbit.interop.integers import integers
from lowbit.interop.module import Layout, Packing, Seen
from lowbit.packed import CodeTerm, PackedMatrix, pack_codes, pack_groups


@dataclass(frozen=True)
class BitNet:
    format: str = "ternary"
    bits_per_weight: float = 2.0

    def layout(self, rows: int, columns: int) -> Layout:
        if rows % 4:
            raise RequestError(f"export to bitnet: a layer has {rows} rows, which is no multiple of 4")
        return {"weight": ("U8", (rows // 4, columns)), "weight_scale": ("F32", (1,))}

    def arrays(self, matrices: Sequence[PackedMatrix]) -> dict[str, np.ndarray] | None:
        numbers, scales = [], []
        for matrix in matrices:
            found = integers(matrix)
            if found is None or found.offsets is not None or found.least < -1 or found.most > 1:
                return None
            numbers.append(found.numbers(0, matrix.out_features))
            scales.append(found.scales.reshape(-1))
        scale = np.unique(np.concatenate(scales))
        if len(scale) != 1:
            return None
        codes = (np.concatenate(numbers) + 1).astype(np.uint8)
        quarters = codes.reshape(4, -1, codes.shape[1])
        packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
        return {"weight": packed, "weight_scale": scale.astype(np.float32)}

    def rounded(self, weight: np.ndarray) -> PackedMatrix:
        """The rule of BitNet b1.58 (round w / mean |w|), then the scale of least squares."""
        mean = float(np.abs(weight).mean()) or 1.0
        numbers = np.clip(np.rint(weight / np.float32(mean)), -1, 1)
        count = int(np.count_nonzero(numbers))
        scale = float(np.vdot(weight, numbers)) / count if count else 0.0
        codes = (numbers + 1).astype(np.uint8)
        scales = pack_groups(np.full((len(weight), 1), scale, np.float32))
        levels = np.array([[-1, 0, 1]], np.float32)
        term = CodeTerm(2, levels, pack_codes(codes, 2), scales, "fp32", 0)
        return PackedMatrix(weight.shape[0], weight.shape[1], (term,), "ternary")


def settle(layers: Mapping[str, Seen], format: str | None) -> dict[str, Packing]:
    if format not in (None, "ternary"):
        raise RequestError(f"export: bitnet:{format} is not written; it has one format, ternary: give bitnet")
    return {name: BitNet() for name in layers}


def quantization_config(packings: Mapping[str, Packing], kept: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": list(kept) or None,
    }
