"""GPTQ checkpoints, versions 1 and 2: qweight, qzeros, scales and g_idx of AutoGPTQ and GPTQModel.

    qweight  int32 [in * bits / 32, out]       codes, packed along the input
    qzeros   int32 [groups, out * bits / 32]   zero points, packed along the output; version 1 stores z - 1
    scales   fp16 | bf16 | fp32 [groups, out]
    g_idx    int32 [in]                        the group of each input; absent or i // group_size without
    desc_act

W = scale * (code - zero). Version 1 subtracts 1 from whole words, or from each 3-bit field: adding it again
is what GPTQModel does, so that a zero point of 0 survives where its writer let it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.model.fields import Fields
from lowbit.model.stored.arrays import Arrays
from lowbit.model.stored.bits import unpack_dense
from lowbit.model.stored.grouping import grouping
from lowbit.model.stored.packing import code_matrix, size_name
from lowbit.packed import PackedMatrix

MARKS = ("qweight",)
BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in every field of a word


@dataclass(frozen=True)
class Config:
    bits: int
    group_size: int  # -1: the whole input
    version: int
    mixed: bool  # some matrices have other bits or groups: both follow from the shapes


def config(quantization: Mapping[str, Any], where: str) -> Config:
    """Read a quantization_config. Raises UnsupportedError for a kind that is not read here."""
    fields = Fields(quantization, where)
    stored = fields.text("checkpoint_format", default="gptq")
    if quantization.get("is_marlin_format"):
        stored = "marlin"
    if stored not in FORMATS:
        raise UnsupportedError(
            f"{where}: checkpoint_format={stored!r:.60}; lowbit reads {' and '.join(FORMATS)}; save the "
            "model in one of them with GPTQModel"
        )
    bits = fields.integer("bits", 1, 64)
    if bits not in BITS:
        raise UnsupportedError(f"{where}: GPTQ with bits={bits}; lowbit reads {', '.join(map(str, BITS))}")
    if str(quantization.get("pack_dtype", "int32")).removeprefix("torch.") != "int32":
        raise UnsupportedError(
            f"{where}: GPTQ with pack_dtype={quantization['pack_dtype']!r:.40}; lowbit reads int32"
        )
    for key in ("rotation", "adapter", "lora"):
        if quantization.get(key):
            raise UnsupportedError(
                f"{where}: GPTQ with {key}={quantization[key]!r:.60}, which changes the network; lowbit "
                "reads checkpoints without it"
            )
    size = fields.integer("group_size", -1, 1 << 24, default=-1)
    if size == 0:
        raise fields.fail("group_size", size, "-1 or at least 1")
    return Config(bits, size, FORMATS.index(stored) + 1, bool(quantization.get("dynamic")))


def parts(arrays: Arrays, config: Config) -> tuple[str, ...] | None:
    return ("qweight", "qzeros", "scales", "g_idx") if arrays.has("qweight") else None


def shape(arrays: Arrays, config: Config) -> tuple[int, int]:
    rows, out_features = _two(arrays, "qweight")
    in_features = rows * 32 // _bits(arrays, config)
    if arrays.has("g_idx") and len(arrays.shape("g_idx")) == 1:
        in_features = arrays.shape("g_idx")[0]  # the last word may hold codes of no input
    return out_features, in_features


def name(arrays: Arrays, config: Config) -> str:
    return (
        f"gptq int{_bits(arrays, config)}-{size_name(_group_size(arrays, config), shape(arrays, config)[1])}"
    )


def read(arrays: Arrays, config: Config) -> PackedMatrix:
    """The matrix, exactly; with act-order as codes over gathered inputs."""
    out_features, in_features = shape(arrays, config)
    arrays.check_size(out_features, in_features)
    bits = _bits(arrays, config)
    words = arrays.take("qweight", ("I32", "U32"), (-(-in_features * bits // 32), out_features))
    size = _group_size(arrays, config)
    scales = arrays.floats("scales", (-(-in_features // size), out_features))
    codes = unpack_dense(np.ascontiguousarray(words.T), bits, in_features)
    zeros = _zeros(arrays, config, bits, scales.shape)
    levels = np.arange(1 << bits, dtype=np.float32)
    groups = grouping(in_features, size, _groups(arrays, in_features, len(scales)))
    label = f"int{bits}{{}}-{size_name(size, in_features)}"
    middle = int(zeros.flat[0])
    if (zeros == middle).all():  # symmetric: the zero point is a part of the levels
        matrix_name = label.format("" if middle == 1 << (bits - 1) else f"z{middle}")
        return code_matrix(codes, bits, levels - middle, scales.T, groups, matrix_name)
    return code_matrix(codes, bits, levels, scales.T, groups, label.format("a"), zero_points=zeros.T)


def _two(arrays: Arrays, part: str) -> tuple[int, int]:
    found = arrays.shape(part)
    if len(found) != 2 or 0 in found:
        raise arrays.damaged(f"{part} has shape {list(found)}, not two dimensions")
    return found[0], found[1]


def _bits(arrays: Arrays, config: Config) -> int:
    if not config.mixed or not arrays.has("g_idx"):
        return config.bits
    found = _two(arrays, "qweight")[0] * 32 / max(1, arrays.shape("g_idx")[0])
    if found not in BITS:
        raise arrays.damaged(f"{found:g} bits follow from the shapes of qweight and g_idx")
    return int(found)


def _group_size(arrays: Arrays, config: Config) -> int:
    in_features = shape(arrays, config)[1]
    if config.mixed:
        return -(-in_features // _two(arrays, "scales")[0])
    return in_features if config.group_size < 0 else config.group_size


def _groups(arrays: Arrays, in_features: int, n_groups: int) -> np.ndarray | None:
    if not arrays.has("g_idx"):
        return None
    found = arrays.take("g_idx", ("I32", "I64"), (in_features,)).astype(np.int64)
    if int(found.min()) < 0 or int(found.max()) >= n_groups:
        raise arrays.damaged(f"g_idx has groups from {found.min()} to {found.max()}; there are {n_groups}")
    return found


def _zeros(arrays: Arrays, config: Config, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Zero points uint8 [groups, out_features]."""
    n_groups, out_features = shape
    words = arrays.take("qzeros", ("I32", "U32"), (n_groups, -(-out_features * bits // 32)))
    if config.version == 1 and bits in _ONES:
        words = (words.astype(np.uint32) + np.uint32(_ONES[bits])).view(np.int32)
    zeros = unpack_dense(words, bits, out_features)
    if config.version == 1 and bits not in _ONES:
        zeros = (zeros + 1) & np.uint8((1 << bits) - 1)
    return zeros
