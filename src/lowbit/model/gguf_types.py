"""The tensor types of GGUF: how a block of bytes becomes weights.

`split` takes blocks apart into codes, scales and factors (gguf_parts.py), so one rule decodes all types, and
PackedMatrix can hold them without requantizing:

    weight = unit * scale * level[code] + offset

The products are exact in float32 (fp16 scale x 8-bit factor x level: at most 24 bits), therefore the result
equals ggml's, whatever the order of its multiplications.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.model import gguf_iq as iq
from lowbit.model import gguf_linear as linear
from lowbit.model import gguf_small as small
from lowbit.model.float_weights import STORED, widened
from lowbit.model.gguf_parts import Bytes, Parts


@dataclass(frozen=True)
class TensorType:
    """One row of the table: `block` weights take `nbytes` bytes.

    split is None where lowbit cannot decode the type; `float_type` names the plain floating-point types.
    bits, group, levels, scale_type and unit are those of the code term that holds the weights: scale_type is
    "fp16", "e8m0" or "e4m3" with a scale for each group, or "m8" with one for each block and int8 factors.
    """

    number: int  # in ggml's enum ggml_type
    name: str
    block: int
    nbytes: int
    split: Callable[[Bytes], Parts] | None = None
    bits: int = 0
    group: int = 0
    levels: tuple[float, ...] = ()
    scale_type: str = "none"
    unit: float = 1.0
    has_offsets: bool = False
    packing: str = "planes"
    grid: str | None = None  # of gguf_grids, which the native module needs
    float_type: str | None = None

    @property
    def readable(self) -> bool:
        return self.split is not None or self.float_type is not None

    @property
    def file_bits(self) -> float:
        """Bits of a weight in the file."""
        return 8 * self.nbytes / self.block

    @property
    def run_bits(self) -> float:
        """Bits of a weight as it runs, without the padding of rows to 32; as in the file for plain floats."""
        if self.split is None:
            return self.file_bits
        numbers = 2 if self.has_offsets else 1
        size = {"fp16": 16, "m8": 8, "e8m0": 8, "e4m3": 8}[self.scale_type] / self.group
        if self.scale_type == "m8":
            size += 16 / self.block
        return (1.6 if self.packing == "base3" else self.bits) + numbers * size


def _row(
    number: int,
    name: str,
    block: int,
    nbytes: int,
    split: Callable[[Bytes], Parts],
    bits: int,
    group: int,
    levels: tuple[float, ...],
    scale_type: str = "m8",
    unit: float = 1.0,
    grid: str | None = None,
) -> TensorType:
    return TensorType(number, name, block, nbytes, split, bits, group, levels, scale_type, unit, grid=grid)


def _linear(
    number: int,
    name: str,
    block: int,
    nbytes: int,
    split: Callable[[Bytes], Parts],
    bits: int,
    group: int,
    first: int,
    has_offsets: bool = False,
) -> TensorType:
    """Levels first, first + 1, .. for all codes."""
    levels = tuple(range(first, first + (1 << bits)))
    scale_type = "m8" if block == 256 else "fp16"
    return TensorType(number, name, block, nbytes, split, bits, group, levels, scale_type, 1.0, has_offsets)


def _ternary(number: int, name: str, nbytes: int, split: Callable[[Bytes], Parts]) -> TensorType:
    return TensorType(number, name, 256, nbytes, split, 2, 256, (-1, 0, 1), "fp16", packing="base3")


# Types without `split` are listed so that their tensors can be placed and named in an error.
TENSOR_TYPES: dict[int, TensorType] = {
    row.number: row
    for row in (
        TensorType(0, "F32", 1, 4, float_type="fp32"),
        TensorType(1, "F16", 1, 2, float_type="fp16"),
        _linear(2, "Q4_0", 32, 18, linear.split_q4_0, 4, 32, -8),
        _linear(3, "Q4_1", 32, 20, linear.split_q4_1, 4, 32, 0, has_offsets=True),
        _linear(6, "Q5_0", 32, 22, linear.split_q5_0, 5, 32, -16),
        _linear(7, "Q5_1", 32, 24, linear.split_q5_1, 5, 32, 0, has_offsets=True),
        _linear(8, "Q8_0", 32, 34, linear.split_q8_0, 8, 32, -128),
        TensorType(9, "Q8_1", 32, 40),
        _linear(10, "Q2_K", 256, 84, linear.split_q2_k, 2, 16, 0, has_offsets=True),
        _linear(11, "Q3_K", 256, 110, linear.split_q3_k, 3, 16, -4),
        _linear(12, "Q4_K", 256, 144, linear.split_q4_k, 4, 32, 0, has_offsets=True),
        _linear(13, "Q5_K", 256, 176, linear.split_q5_k, 5, 32, 0, has_offsets=True),
        _linear(14, "Q6_K", 256, 210, linear.split_q6_k, 6, 16, -32),
        TensorType(15, "Q8_K", 256, 292),
        _row(16, "IQ2_XXS", 256, 66, iq.split_iq2_xxs, 3, 32, iq.IQ2, unit=0.125, grid="iq2_xxs"),
        _row(17, "IQ2_XS", 256, 74, iq.split_iq2_xs, 3, 16, iq.IQ2, unit=0.125, grid="iq2_xs"),
        _row(18, "IQ3_XXS", 256, 98, iq.split_iq3_xxs, 4, 32, iq.IQ3_XXS, unit=0.25, grid="iq3_xxs"),
        _row(19, "IQ1_S", 256, 50, iq.split_iq1_s, 2, 32, iq.IQ1_S, unit=0.125, grid="iq1"),
        _row(20, "IQ4_NL", 32, 18, small.split_iq4_nl, 4, 32, small.IQ4, "fp16"),
        _row(21, "IQ3_S", 256, 110, iq.split_iq3_s, 4, 32, iq.IQ3_S, grid="iq3_s"),
        _row(22, "IQ2_S", 256, 82, iq.split_iq2_s, 3, 16, iq.IQ2, unit=0.125, grid="iq2_s"),
        _row(23, "IQ4_XS", 256, 136, small.split_iq4_xs, 4, 32, small.IQ4),
        TensorType(24, "I8", 1, 1),
        TensorType(25, "I16", 1, 2),
        TensorType(26, "I32", 1, 4),
        TensorType(27, "I64", 1, 8),
        TensorType(28, "F64", 1, 8),
        _row(29, "IQ1_M", 256, 56, iq.split_iq1_m, 3, 16, iq.IQ1_M, unit=0.125, grid="iq1"),
        TensorType(30, "BF16", 1, 2, float_type="bf16"),
        _ternary(34, "TQ1_0", 54, small.split_tq1_0),
        _ternary(35, "TQ2_0", 66, small.split_tq2_0),
        _row(39, "MXFP4", 32, 17, small.split_mxfp4, 4, 32, small.E2M1, "e8m0"),
        _row(40, "NVFP4", 64, 36, small.split_nvfp4, 4, 16, small.E2M1, "e4m3"),
        _row(41, "Q1_0", 128, 18, small.split_q1_0, 1, 128, (-1, 1), "fp16"),
    )
}
# Numbers that ggml used once, or that are not meant for files; for the error.
_FORMER = {
    4: "Q4_2, which ggml removed in 2023",
    5: "Q4_3, which ggml removed in 2023",
    **dict.fromkeys(
        (31, 32, 33), "a repacked Q4_0 (Q4_0_4_4 and the like), which ggml makes at load time now"
    ),
    **dict.fromkeys((36, 37, 38), "a repacked IQ4_NL, which ggml makes at load time now"),
}
_WHY = {
    "Q8_1": "it holds activations, not weights",
    "Q8_K": "it holds activations, not weights",
    **dict.fromkeys(("I8", "I16", "I32", "I64", "F64"), "it is no type of weights"),
}


def tensor_type(number: int, operation: str) -> TensorType:
    """The type with ggml's `number`; UnsupportedError beginning with `operation` when it is unknown."""
    kind = TENSOR_TYPES.get(number)
    if kind is None:
        what = f": {_FORMER[number]}" if number in _FORMER else ""
        raise UnsupportedError(
            f"{operation} has the unknown type {number}{what}; lowbit reads {_readable_names()}: quantize "
            "the model again"
        )
    return kind


def check_readable(kind: TensorType, operation: str) -> None:
    """Raise UnsupportedError beginning with `operation` unless `kind` can be decoded."""
    if not kind.readable:
        why = f" ({_WHY[kind.name]})" if kind.name in _WHY else ""
        raise UnsupportedError(
            f"{operation}: type {kind.name} has no decoder{why}; lowbit reads {_readable_names()}: convert it"
        )


def _readable_names() -> str:
    return ", ".join(kind.name for kind in TENSOR_TYPES.values() if kind.readable)


def decode(raw: np.ndarray, kind: TensorType) -> np.ndarray:
    """Decode the bytes of whole blocks: uint8 [...] -> float32 [weights], bit for bit what ggml gives.

    Raises UnsupportedError for a type without a decoder.
    """
    check_readable(kind, "decode")
    if kind.float_type is not None:
        return widened(raw.view(STORED[kind.float_type]), kind.float_type).reshape(-1)
    parts = split(raw, kind)
    levels = np.zeros(1 << kind.bits, np.float32)
    levels[: len(kind.levels)] = kind.levels
    if kind.name == "TQ2_0":
        levels[3] = 2
    if kind.scale_type in _SMALL_SCALES:
        levels *= 2  # see there
    weights = levels[parts.codes].reshape(-1, kind.block // kind.group, kind.group)
    with np.errstate(all="ignore"):  # a damaged scale may be NaN or infinite; whoever uses the weights checks
        weights *= scale_values(parts, kind)[:, :, None]
        if parts.offsets is not None:
            offsets = parts.offsets.astype(np.float32)
            if parts.offset_factors is not None:
                offsets = offsets * parts.offset_factors.astype(np.float32)
            weights += offsets[:, :, None]
    return weights.reshape(-1)


# Halves of scales for levels times two, as ggml reads them: so 255, no number of e8m0, is 2^127; of e4m3 240.
_SMALL_SCALES = {
    "e8m0": np.ldexp(1.0, np.arange(256) - 128).astype(np.float32),
    "e4m3": np.array(
        [np.ldexp((8.0 if e else 0.0) + m, (e or 1) - 11) for e in range(16) for m in range(8)] * 2,
        np.float32,
    ),
}


def scale_values(parts: Parts, kind: TensorType) -> np.ndarray:
    """The scale of each group with the type's unit, of e8m0 and e4m3 half of it, float32 [n, groups]."""
    if kind.scale_type in _SMALL_SCALES:
        return _SMALL_SCALES[kind.scale_type][parts.scales]
    scales = parts.scales.astype(np.float32)
    if parts.factors is not None:
        scales = scales * parts.factors.astype(np.float32)
    return scales * np.float32(kind.unit)


def split(raw: np.ndarray, kind: TensorType) -> Parts:
    """Take the bytes of whole blocks apart into codes, scales, offsets and factors.

    raw: uint8, a multiple of kind.nbytes. Raises UnsupportedError for a type without a decoder.
    """
    check_readable(kind, "decode")
    assert kind.split is not None
    return kind.split(raw.reshape(-1, kind.nbytes))
