"""AWQ checkpoints of the gemm kind: 4-bit codes packed along the output, eight to a word in an order of their
own. Layout: model/stored/awq.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import RequestError
from lowbit.interop.coded import Shape, coded
from lowbit.interop.integers import halves
from lowbit.interop.module import Layout, Packing, Seen
from lowbit.interop.uniform import uniform
from lowbit.packed import PackedMatrix

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the row of each nibble of a word, lowest first


@dataclass(frozen=True)
class Awq:
    shape: Shape

    @property
    def format(self) -> str:
        return self.shape.name

    @property
    def bits_per_weight(self) -> float:
        return 4 + (20 / self.shape.group if self.shape.group else 0.0)

    def layout(self, rows: int, columns: int) -> Layout:
        groups = columns // self.shape.group if self.shape.group else 1
        if rows % 8:
            raise RequestError(
                f"export to awq: a layer has {rows} rows, which is no multiple of 8; take compressed-tensors"
            )
        return {
            "qweight": ("I32", (columns, rows // 8)),
            "qzeros": ("I32", (groups, rows // 8)),
            "scales": ("F16", (groups, rows)),
        }

    def arrays(self, matrices: Sequence[PackedMatrix]) -> dict[str, np.ndarray] | None:
        found = coded(matrices, self.shape)
        scales = None if found is None else halves(found.scales)
        if found is None or scales is None:
            return None
        return {
            "qweight": _words(found.codes),
            "qzeros": _words(found.zero_points),
            "scales": np.ascontiguousarray(scales.T),
        }


def _words(codes: np.ndarray) -> np.ndarray:
    """uint8 [rows, n] to int32 [n, rows / 8]."""
    nibbles = codes.reshape(-1, 8, codes.shape[1])[:, _ORDER, :]  # [rows / 8, nibble, n]
    data = nibbles[:, 0::2] | nibbles[:, 1::2] << 4  # [rows / 8, byte, n]
    return np.ascontiguousarray(data.transpose(2, 0, 1)).view("<i4")[:, :, 0]


def settle(layers: Mapping[str, Seen], format: str | None) -> dict[str, Packing]:
    shape = uniform("awq", layers, format, (4,))
    return {name: Awq(shape) for name in layers}


def quantization_config(packings: Mapping[str, Packing], kept: Sequence[str]) -> dict[str, Any]:
    packing = next(iter(packings.values()))
    assert isinstance(packing, Awq)
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": packing.shape.group or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(kept) or None,
    }
