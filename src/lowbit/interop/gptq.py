"""GPTQ checkpoints: symmetric codes in version 1, which stores zero-points less 1, others in version 2.

Layout: model/stored/gptq.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import RequestError
from lowbit.interop.coded import Shape, coded, pack_words
from lowbit.interop.integers import halves
from lowbit.interop.module import Layout, Packing, Seen
from lowbit.interop.uniform import uniform
from lowbit.packed import PackedMatrix

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Gptq:
    """One layer: rows must be a multiple of 32 / gcd(bits, 32), inputs likewise."""

    shape: Shape

    @property
    def format(self) -> str:
        return self.shape.name

    @property
    def bits_per_weight(self) -> float:
        return self.shape.bits + ((16 + self.shape.bits) / self.shape.group if self.shape.group else 0.0)

    @property
    def version(self) -> int:
        return 1 if self.shape.symmetric else 2

    def layout(self, rows: int, columns: int) -> Layout:
        bits, groups = self.shape.bits, columns // self.shape.group if self.shape.group else 1
        if columns * bits % 32 or rows * bits % 32:
            raise RequestError(
                f"export to gptq: a layer of {rows} x {columns} does not fill words with {bits}-bit "
                "codes; take compressed-tensors"
            )
        return {
            "qweight": ("I32", (columns * bits // 32, rows)),
            "qzeros": ("I32", (groups, rows * bits // 32)),
            "scales": ("F16", (groups, rows)),
            "g_idx": ("I32", (columns,)),
        }

    def arrays(self, matrices: Sequence[PackedMatrix]) -> dict[str, np.ndarray] | None:
        found = coded(matrices, self.shape)
        scales = None if found is None else halves(found.scales)
        if found is None or scales is None:
            return None
        columns = found.codes.shape[1]
        zero_points = found.zero_points.T - (1 if self.version == 1 else 0)
        packed = pack_words(found.codes, self.shape.bits)
        return {
            "qweight": np.ascontiguousarray(packed.T),
            "qzeros": pack_words(np.ascontiguousarray(zero_points, np.uint8), self.shape.bits),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": (np.arange(columns) // (self.shape.group or columns)).astype(np.int32),
        }


def settle(layers: Mapping[str, Seen], format: str | None) -> dict[str, Packing]:
    shape = uniform("gptq", layers, format, BITS)
    return {name: Gptq(shape) for name in layers}


def quantization_config(packings: Mapping[str, Packing], kept: Sequence[str]) -> dict[str, Any]:
    packing = next(iter(packings.values()))
    assert isinstance(packing, Gptq)
    return {
        "quant_method": "gptq",
        "bits": packing.shape.bits,
        "group_size": packing.shape.group or -1,
        "desc_act": False,
        "sym": packing.shape.symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if packing.version == 1 else "gptq_v2",
        "pack_dtype": "int32",
        "quantizer": "lowbit",
    }
