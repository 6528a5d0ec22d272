"""Ternary weights of transformers' bitnet integration, packed four rows to a byte.

    weight        uint8 [out / 4, in]: bits 2 i, 2 i + 1 of row r hold weight + 1 of row i * out / 4 + r
    weight_scale  [1]: BitLinear divides its output by it; AutoBitLinear, stored offline, multiplies, and its
                  weights may also be stored as floats -1, 0, 1

A model of linear_class "autobitlinear" and quantization_mode "online" stores the floats that it was trained
with, and rounds each matrix at every call to -1, 0, 1 times its mean magnitude. That is done once here: what
is stored then is what it runs with. Activations are rounded to 8 bits per token there; here also per group of
64 inputs, as everywhere in lowbit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.model.fields import Fields
from lowbit.model.stored.arrays import FLOATS, Arrays
from lowbit.model.stored.grouping import Grouping
from lowbit.model.stored.packing import code_matrix
from lowbit.packed import PackedMatrix

MARKS = ("weight",)
CLASSES = ("bitlinear", "autobitlinear")


@dataclass(frozen=True)
class Config:
    multiplies: bool
    online: bool
    floats: tuple[str, ...]  # online: names of matrices that are not rounded


def config(quantization: Mapping[str, Any], where: str) -> Config:
    """Read a quantization_config. Raises UnsupportedError for a kind that is not read here."""
    fields = Fields(quantization, where)
    linear = fields.text("linear_class", default="bitlinear")
    mode = fields.text("quantization_mode", default="offline")
    if linear not in CLASSES or mode not in ("offline", "online") or (mode, linear) == ("online", CLASSES[0]):
        raise UnsupportedError(
            f"{where}: bitnet with linear_class={linear!r:.40} and quantization_mode={mode!r:.40}; lowbit "
            f"reads {' and '.join(CLASSES)} with weights stored offline, and autobitlinear online"
        )
    if fields.boolean("use_rms_norm"):
        raise UnsupportedError(
            f"{where}: bitnet with use_rms_norm, a norm before every matrix; lowbit runs the bitnet family, "
            "whose norms are a part of the network"
        )
    listed = fields.items("modules_to_not_convert", str, 4096) or []
    return Config(linear == "autobitlinear", mode == "online", tuple(listed))


def parts(arrays: Arrays, config: Config) -> tuple[str, ...] | None:
    stored = arrays.dtype("weight")
    if stored is None or len(arrays.shape("weight")) != 2:
        return None
    if stored == "U8" or (config.multiplies and stored in FLOATS and arrays.has("weight_scale")):
        return ("weight", "weight_scale")
    if config.online and stored in FLOATS and arrays.stem.endswith("_proj"):
        kept = any(arrays.stem == name or arrays.stem.endswith(f".{name}") for name in config.floats)
        return None if kept else ("weight",)
    return None


def shape(arrays: Arrays, config: Config) -> tuple[int, int]:
    rows, in_features = arrays.shape("weight")
    return (4 * rows if arrays.dtype("weight") == "U8" else rows), in_features


def name(arrays: Arrays, config: Config) -> str:
    return "bitnet ternary-row"


def read(arrays: Arrays, config: Config) -> PackedMatrix:
    """The matrix, exactly: -1, 0, 1 times or over one scale."""
    out_features, in_features = shape(arrays, config)
    arrays.check_size(out_features, in_features)
    if config.online and arrays.dtype("weight") != "U8":
        return _round(arrays)
    codes = _codes(arrays)
    scale = arrays.floats("weight_scale", (1,))[0]
    if not config.multiplies:
        if scale == 0:
            raise arrays.damaged("weight_scale is 0, and the weights are divided by it")
        scale = np.float32(1) / scale
        if not np.isfinite(scale):
            raise arrays.damaged(f"weight_scale is {1 / scale:g}, and the weights are divided by it")
    levels = np.array([-1, 0, 1], np.float32)
    scales = np.full((1, 1), scale, np.float32)
    return code_matrix(codes, 2, levels, scales, Grouping(0), "ternary-row", base3=True)


def _codes(arrays: Arrays) -> np.ndarray:
    """uint8 [out, in]: weight + 1."""
    if arrays.dtype("weight") != "U8":
        values = arrays.floats("weight", (None, None))
        if not np.isin(values, (-1, 0, 1)).all():
            raise UnsupportedError(
                f"load {arrays.stem}: weight holds other numbers than -1, 0 and 1, which only an online "
                "model rounds; lowbit reads weights stored offline"
            )
        return (values + 1).astype(np.uint8)
    packed = arrays.take("weight", ("U8",), (None, None))
    codes = np.concatenate([packed >> np.uint8(2 * i) & np.uint8(3) for i in range(4)])
    if int(codes.max()) > 2:
        raise arrays.damaged("weight holds a code of 3, which no ternary weight has")
    return codes


def _round(arrays: Arrays) -> PackedMatrix:
    """What AutoBitLinear rounds floats to: code / scale in their type, scale = 1 / mean magnitude."""
    values = arrays.floats("weight", (None, None))
    scale = np.float32(1) / max(np.abs(values).mean(dtype=np.float32), np.float32(1e-5))
    codes = (np.clip(np.rint(values * scale), -1, 1) + 1).astype(np.uint8)
    step = (np.float32(1) / scale).reshape(1, 1)
    if arrays.dtype("weight") == "F16":
        step = step.astype(np.float16).astype(np.float32)
    elif arrays.dtype("weight") == "BF16":
        step = bfloat16(step)
    levels = np.array([-1, 0, 1], np.float32)
    return code_matrix(codes, 2, levels, step, Grouping(0), "ternary-row", base3=True)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(
        np.float32
    )
