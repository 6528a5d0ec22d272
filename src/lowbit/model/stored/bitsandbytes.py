"""bitsandbytes: NF4 and FP4, with and without double quantization, and the stored weights of LLM.int8().

4 bits   weight U8 [n / 2, 1]            two codes to a byte, the high nibble first, in the order of the
         weights weight.quant_map F32 [16]       the levels
         weight.absmax F32 [blocks]      scales of blocks of `blocksize` weights that run on from row to row
         weight.quant_state.bitsandbytes__nf4   U8, JSON: shape, blocksize, ..
         double quantization: weight.absmax U8, and weight.nested_absmax, weight.nested_quant_map; a scale is
         nested_quant_map[absmax] * nested_absmax + nested_offset, held here as float32
8 bits   weight I8 [out, in], SCB F32 [out]: W = weight * SCB / 127

LLM.int8() multiplies inputs above a threshold in 16 bits, chosen at every call; here inputs are rounded in
groups of 64, which an outlier does not leave. Where a block does not fit into a row the weights become
float32. Source: arXiv:2305.14314, arXiv:2208.07339 and the serialization of bitsandbytes' QuantState.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.model.fields import Fields
from lowbit.model.float_weights import float_matrix
from lowbit.model.stored.arrays import Arrays
from lowbit.model.stored.grouping import UNIT, Grouping
from lowbit.model.stored.packing import code_matrix
from lowbit.packed import PackedMatrix

MARKS = ("weight",)
TYPES = ("nf4", "fp4")
_STATE = "weight.quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 1 << 16


@dataclass(frozen=True)
class Config:
    pass


@dataclass(frozen=True)
class _State:
    type: str
    shape: tuple[int, int]
    blocksize: int
    nested_blocksize: int
    nested_offset: float


def config(quantization: Mapping[str, Any], where: str) -> Config:
    """Read a quantization_config. Raises UnsupportedError for a kind that is not read here."""
    kind = str(quantization.get("bnb_4bit_quant_type", "nf4"))
    if quantization.get("load_in_4bit") and kind not in TYPES:
        raise UnsupportedError(
            f"{where}: bnb_4bit_quant_type={kind!r:.40}; lowbit reads {' and '.join(TYPES)}"
        )
    storage = str(quantization.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch.")
    if storage != "uint8":
        raise UnsupportedError(
            f"{where}: bnb_4bit_quant_storage={storage!r:.40}; lowbit reads uint8: save the model with it"
        )
    return Config()


def parts(arrays: Arrays, config: Config) -> tuple[str, ...] | None:
    if arrays.has("SCB") and arrays.dtype("weight") == "I8":
        return ("weight", "SCB", "weight_format")
    kind = _type(arrays)
    if kind is None:
        return None
    nested = ("weight.nested_absmax", "weight.nested_quant_map")
    return ("weight", "weight.absmax", "weight.quant_map", *nested, _STATE + kind)


def shape(arrays: Arrays, config: Config) -> tuple[int, int]:
    if _type(arrays) is not None:
        return _state(arrays).shape
    found = arrays.shape("weight")
    if len(found) != 2:
        raise arrays.damaged(f"weight has shape {list(found)}, not two dimensions")
    return found[0], found[1]


def name(arrays: Arrays, config: Config) -> str:
    kind = _type(arrays)
    return "llm.int8" if kind is None else f"bitsandbytes {kind}-g{_state(arrays).blocksize}"


def read(arrays: Arrays, config: Config) -> PackedMatrix:
    """The matrix, exactly."""
    out_features, in_features = shape(arrays, config)
    arrays.check_size(out_features, in_features)
    if _type(arrays) is None:
        return _read_int8(arrays, out_features, in_features)
    state = _state(arrays)
    count = out_features * in_features
    packed = arrays.take("weight", ("U8",), (-(-count // 2), 1)).reshape(-1)
    codes = np.empty((len(packed), 2), np.uint8)
    codes[:, 0], codes[:, 1] = packed >> 4, packed & 15
    codes = codes.reshape(-1)[:count].reshape(out_features, in_features)
    levels = arrays.floats("weight.quant_map", (16,))
    scales = _absmax(arrays, state, -(-count // state.blocksize))
    # Blocks run on from row to row: a row is cut into pieces that lie in one block each.
    piece = math.gcd(in_features, state.blocksize)
    size = in_features if state.blocksize % in_features == 0 else piece
    if size != in_features and size % UNIT:
        values = levels[codes] * np.repeat(scales, state.blocksize)[:count].reshape(codes.shape)
        return float_matrix(values, "fp32")
    starts = np.arange(0, count, size) // state.blocksize
    grouped = scales[starts].reshape(out_features, in_features // size)
    groups = Grouping(0 if size == in_features else size)
    return code_matrix(codes, 4, levels, grouped, groups, f"{state.type}-g{state.blocksize}")


def _read_int8(arrays: Arrays, out_features: int, in_features: int) -> PackedMatrix:
    if arrays.has("weight_format"):
        found = arrays.take("weight_format", ("U8", "I8", "I32", "I64"), arrays.shape("weight_format"))
        if found.size != 1 or int(found.reshape(-1)[0]) != 0:
            raise UnsupportedError(
                f"load {arrays.stem}: weight_format={found.reshape(-1)[:4].tolist()}, rows in the order of a "
                "GPU; lowbit reads 0 (row): load and save the model with a current bitsandbytes"
            )
    codes = arrays.take("weight", ("I8",), (out_features, in_features)).view(np.uint8) ^ np.uint8(128)
    scales = arrays.floats("SCB", (out_features,)).reshape(-1, 1)
    levels = np.arange(-128, 128, dtype=np.float32)
    return code_matrix(codes, 8, levels, scales, Grouping(0), "int8-row", tensor_divisor=127.0)


def _type(arrays: Arrays) -> str | None:
    return next((kind for kind in TYPES if arrays.has(_STATE + kind)), None)


def _state(arrays: Arrays) -> _State:
    kind = _type(arrays)
    assert kind is not None
    part = _STATE + kind
    stored = arrays.take(part, ("U8",), (None,))
    if stored.size > _MAX_STATE_BYTES:
        raise arrays.damaged(f"{part} has {stored.size} bytes")
    try:
        values = json.loads(stored.tobytes())
    except (ValueError, RecursionError) as error:
        raise arrays.damaged(f"{part} is not JSON") from error
    if not isinstance(values, dict):
        raise arrays.damaged(f"{part} holds a {type(values).__name__}, not an object")
    fields = Fields(values, f"{arrays.stem}.{part}")
    if fields.text("quant_type") != kind:
        raise arrays.damaged(f"{part} says quant_type={values['quant_type']!r:.40}")
    size = fields.items("shape", int, 2)
    if size is None or len(size) != 2 or not all(0 < n < 1 << 31 for n in size):
        raise arrays.damaged(f"{part} says shape={size}")
    blocksize = fields.integer("blocksize", 1, 1 << 20)
    if blocksize & (blocksize - 1):
        raise arrays.damaged(f"{part} says blocksize={blocksize}, which is no power of two")
    return _State(
        kind,
        (size[0], size[1]),
        blocksize,
        fields.integer("nested_blocksize", 1, 1 << 20, default=256),
        fields.number("nested_offset", -1e30, 1e30, default=0.0),
    )


def _absmax(arrays: Arrays, state: _State, blocks: int) -> np.ndarray:
    """Scales of the blocks, float32 [blocks]."""
    if arrays.dtype("weight.absmax") != "U8":
        return arrays.floats("weight.absmax", (blocks,))
    codes = arrays.take("weight.absmax", ("U8",), (blocks,))
    levels = arrays.floats("weight.nested_quant_map", (256,))
    outer = arrays.floats("weight.nested_absmax", (-(-blocks // state.nested_blocksize),))
    inner = levels[codes] * np.repeat(outer, state.nested_blocksize)[:blocks]
    return inner + np.float32(state.nested_offset)
