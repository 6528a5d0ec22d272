"""AWQ checkpoints of version "gemm": 4-bit codes packed along the output.

    qweight  int32 [in, out / 8]        a word holds 8 outputs, nibble j that of output ORDER[j]
    qzeros   int32 [groups, out / 8]    zero points in the same order
    scales   fp16 | bf16 | fp32 [groups, out]

W = scale * (code - zero). Source: arXiv:2306.00978 and the packing of AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.model.fields import Fields
from lowbit.model.stored.arrays import Arrays
from lowbit.model.stored.grouping import grouping
from lowbit.model.stored.packing import code_matrix, size_name
from lowbit.packed import PackedMatrix

MARKS = ("qweight",)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Config:
    group_size: int  # -1: the whole input
    zero_point: bool


def config(quantization: Mapping[str, Any], where: str) -> Config:
    """Read a quantization_config. Raises UnsupportedError for a kind that is not read here."""
    fields = Fields(quantization, where)
    version = str(quantization.get("version", "gemm")).lower()
    if version != "gemm":
        raise UnsupportedError(f"{where}: AWQ with version={version!r:.40}; lowbit reads gemm")
    bits = fields.integer("bits" if "bits" in quantization else "w_bit", 1, 64)
    if bits != 4:
        raise UnsupportedError(f"{where}: AWQ with bits={bits}; lowbit reads 4")
    size = fields.integer("group_size" if "group_size" in quantization else "q_group_size", -1, 1 << 24)
    if size == 0:
        raise fields.fail("group_size", size, "-1 or at least 1")
    return Config(size, fields.boolean("zero_point", default=True))


def parts(arrays: Arrays, config: Config) -> tuple[str, ...] | None:
    return ("qweight", "qzeros", "scales") if arrays.has("qweight") else None


def shape(arrays: Arrays, config: Config) -> tuple[int, int]:
    found = arrays.shape("qweight")
    if len(found) != 2:
        raise arrays.damaged(f"qweight has shape {list(found)}, not two dimensions")
    return found[1] * 8, found[0]


def name(arrays: Arrays, config: Config) -> str:
    in_features = shape(arrays, config)[1]
    return f"awq int4-{size_name(_size(config, in_features), in_features)}"


def read(arrays: Arrays, config: Config) -> PackedMatrix:
    """The matrix, exactly."""
    out_features, in_features = shape(arrays, config)
    arrays.check_size(out_features, in_features)
    size = _size(config, in_features)
    n_groups = -(-in_features // size)
    codes = _nibbles(arrays.take("qweight", ("I32", "U32"), (in_features, out_features // 8)))
    scales = arrays.floats("scales", (n_groups, out_features)).T
    levels, groups = np.arange(16, dtype=np.float32), grouping(in_features, size)
    text = size_name(size, in_features)
    if not config.zero_point and not arrays.has("qzeros"):
        return code_matrix(codes, 4, levels - 8, scales, groups, f"int4-{text}")
    zeros = _nibbles(arrays.take("qzeros", ("I32", "U32"), (n_groups, out_features // 8)))
    if (zeros == 8).all():
        return code_matrix(codes, 4, levels - 8, scales, groups, f"int4-{text}")
    return code_matrix(codes, 4, levels, scales, groups, f"int4a-{text}", zero_points=zeros)


def _size(config: Config, in_features: int) -> int:
    return in_features if config.group_size < 0 else config.group_size


def _nibbles(words: np.ndarray) -> np.ndarray:
    """uint8 [8 n, rows] from int32 [rows, n]: a row for each output."""
    turned = np.ascontiguousarray(words.T).view(np.uint32)
    codes = np.empty((len(turned), 8, turned.shape[1]), np.uint8)
    for nibble, output in enumerate(ORDER):
        codes[:, output] = turned >> np.uint32(4 * nibble) & np.uint32(15)
    return codes.reshape(-1, turned.shape[1])
