"""8-bit floats with scales per tensor, per output or per block, as transformers and vLLM store them.

    quant_method fp8          weight F8_E4M3 [out, in] and weight_scale_inv, which multiplies despite its
                              name: [out / bh, in / bw] of weight_block_size (DeepSeek: 128 x 128), or one
                              number; vLLM's checkpoints call the one number weight_scale
    quant_method fbgemm_fp8   weight F8_E4M3 and weight_scale [out, 1]

Scales are fp32, fp16, bf16, or powers of two (F8_E8M0). Activation scales of static schemes are not used:
here activations are rounded to int8 per token and group of 64, which is finer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.model.fields import Fields
from lowbit.model.stored.arrays import FLOATS, Arrays
from lowbit.model.stored.grouping import Grouping, grouping
from lowbit.model.stored.packing import FP8, FP8_NAMES, code_matrix, has_nan
from lowbit.packed import PackedMatrix

MARKS = ("weight",)
SCALES = ("weight_scale_inv", "weight_scale")


@dataclass(frozen=True)
class Config:
    block: tuple[int, int] | None  # rows and inputs that share a scale; None: per tensor or per output


def config(quantization: Mapping[str, Any], where: str) -> Config:
    """Read a quantization_config. Raises UnsupportedError for a kind that is not read here."""
    fields = Fields(quantization, where)
    if quantization.get("quant_method") == "fbgemm_fp8":
        return Config(None)
    kind = str(quantization.get("fmt", "e4m3"))
    experts = str(quantization.get("expert_dtype") or "fp8")
    if kind not in ("e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2") or experts != "fp8":
        raise UnsupportedError(
            f"{where}: fp8 with fmt={kind!r:.40} and expert_dtype={experts!r:.40}; lowbit reads e4m3 and e5m2"
        )
    block = fields.items("weight_block_size", int, 2)
    if block is None:
        return Config(None)
    if len(block) != 2 or min(block) < 1:
        raise fields.fail("weight_block_size", block, "two sizes of at least 1")
    return Config((block[0], block[1]))


def parts(arrays: Arrays, config: Config) -> tuple[str, ...] | None:
    if arrays.dtype("weight") not in FP8 or len(arrays.shape("weight")) != 2:
        return None
    return ("weight", *SCALES, "input_scale", "activation_scale", "input_scale_ub")


def shape(arrays: Arrays, config: Config) -> tuple[int, int]:
    out_features, in_features = arrays.shape("weight")
    return out_features, in_features


def name(arrays: Arrays, config: Config) -> str:
    kind = FP8_NAMES[str(arrays.dtype("weight"))]
    return f"{kind} {config.block[0]}x{config.block[1]}" if config.block else kind


def read(arrays: Arrays, config: Config) -> PackedMatrix:
    """The matrix, exactly."""
    return fp8_matrix(arrays, next((part for part in SCALES if arrays.has(part)), SCALES[0]), config.block)


def fp8_matrix(arrays: Arrays, part: str, block: tuple[int, int] | None) -> PackedMatrix:
    """The matrix of F8 `weight` whose scales are the array `part`."""
    out_features, in_features = arrays.shape("weight")
    arrays.check_size(out_features, in_features)
    dtype = str(arrays.dtype("weight"))
    codes = arrays.take("weight", tuple(FP8), (out_features, in_features))
    if has_nan(codes, dtype):
        raise arrays.damaged("weight holds NaN or infinities")
    found = arrays.shape(part)
    if block and len(found) == 2:
        rows, inputs = block
        scales = _scales(arrays, part, (-(-out_features // rows), -(-in_features // inputs)))
        scales = np.repeat(scales, rows, axis=0)[:out_features]
        groups = grouping(in_features, inputs)
    elif int(np.prod(found)) == 1:
        scales, groups = _scales(arrays, part, found).reshape(1, 1), Grouping(0)
    else:
        flat = (out_features, 1) if len(found) == 2 else (out_features,)
        scales, groups = _scales(arrays, part, flat).reshape(out_features, 1), Grouping(0)
    return code_matrix(codes, 8, FP8[dtype], scales, groups, FP8_NAMES[dtype])


def _scales(arrays: Arrays, part: str, shape: tuple[int, ...]) -> np.ndarray:
    if arrays.dtype(part) != "F8_E8M0":
        return arrays.floats(part, shape)
    powers = arrays.take(part, (*FLOATS, "F8_E8M0"), shape)
    if (powers == 255).any():
        raise arrays.damaged(f"{part} holds NaN")
    return np.ldexp(np.float32(1), powers.astype(np.int32) - 127).astype(np.float32)
