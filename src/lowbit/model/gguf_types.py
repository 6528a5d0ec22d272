"""The tensor types of GGUF: how a block of bytes becomes weights.

Every quantized type that is read here is linear: a block of 32 or 256 weights holds unsigned codes and, for
each group of 16 or 32 of them, a scale and perhaps an offset, so that

    weight = scale * (code + base) + offset

`split` takes blocks apart into exactly that, so one rule decodes them all and PackedMatrix can hold them
without requantizing. The products are exact in float32 (fp16 scale x 6-bit factor x code: at most 24 bits),
therefore the result equals ggml's, whatever the order of its multiplications.
Source of the byte layouts: ggml-quants.c and ggml-common.h of the ggml project.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.model.float_weights import STORED, widened

Bytes = np.ndarray  # uint8


class Parts(NamedTuple):
    """codes: uint8 [n, block]; scales, offsets: float16 or float32 [n, groups]; offsets may be None."""

    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None


@dataclass(frozen=True)
class TensorType:
    """One row of the table: `block` weights take `nbytes` bytes.

    split is None where lowbit cannot decode the type; `float_type` names the plain floating-point types.
    """

    number: int  # in ggml's enum ggml_type
    name: str
    block: int
    nbytes: int
    split: Callable[[Bytes], Parts] | None = None
    bits: int = 0
    group: int = 0
    base: int = 0
    scale_type: str = "none"
    has_offsets: bool = False
    float_type: str | None = None

    @property
    def readable(self) -> bool:
        return self.split is not None or self.float_type is not None


def _half(blocks: Bytes, start: int) -> np.ndarray:
    """The fp16 value at byte `start` of each block: float16 [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")


def _nibbles(packed: Bytes) -> np.ndarray:
    """[n, bytes] -> [n, 2, bytes]: low nibbles, then high nibbles."""
    return np.stack((packed & 15, packed >> 4), axis=1)


def _pairs(packed: Bytes) -> np.ndarray:
    """[n, bytes] -> [n, 4, bytes]: the four 2-bit fields of each byte, lowest first."""
    return np.stack((packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6), axis=1)


def _bits(packed: Bytes) -> np.ndarray:
    """[n, bytes] -> [n, 8 * bytes] bits, lowest first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _split_q4_0(blocks: Bytes) -> Parts:
    return Parts(_nibbles(blocks[:, 2:]).reshape(-1, 32), _half(blocks, 0), None)


def _split_q4_1(blocks: Bytes) -> Parts:
    return Parts(_nibbles(blocks[:, 4:]).reshape(-1, 32), _half(blocks, 0), _half(blocks, 2))


def _split_q5_0(blocks: Bytes) -> Parts:
    codes = _nibbles(blocks[:, 6:]).reshape(-1, 32) | _bits(blocks[:, 2:6]) << 4
    return Parts(codes, _half(blocks, 0), None)


def _split_q5_1(blocks: Bytes) -> Parts:
    codes = _nibbles(blocks[:, 8:]).reshape(-1, 32) | _bits(blocks[:, 4:8]) << 4
    return Parts(codes, _half(blocks, 0), _half(blocks, 2))


def _split_q8_0(blocks: Bytes) -> Parts:
    return Parts(blocks[:, 2:] ^ 0x80, _half(blocks, 0), None)  # int8 v is the code v + 128


def _wide(half: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """fp16 [n, 1] times small integers [n, groups], exactly: float32."""
    with np.errstate(all="ignore"):
        return half.astype(np.float32) * factor.astype(np.float32)


def _split_q2_k(blocks: Bytes) -> Parts:
    packed_scales = blocks[:, :16]
    codes = _pairs(blocks[:, 16:80].reshape(-1, 32)).reshape(-1, 256)
    scales = _wide(_half(blocks, 80), packed_scales & 15)
    return Parts(codes, scales, -_wide(_half(blocks, 82), packed_scales >> 4))


def _split_q3_k(blocks: Bytes) -> Parts:
    low = _pairs(blocks[:, 32:96].reshape(-1, 32)).reshape(-1, 256)
    high = np.unpackbits(blocks[:, None, :32], axis=1, bitorder="little").reshape(-1, 256)  # [n, 8, 32]
    factors = _nibbles(blocks[:, 96:104]).reshape(-1, 16) | _pairs(blocks[:, 104:108]).reshape(-1, 16) << 4
    return Parts(low | high << 2, _wide(_half(blocks, 108), factors.astype(np.int8) - 32), None)


def _six_bit_pairs(packed: Bytes) -> tuple[np.ndarray, np.ndarray]:
    """The 12 bytes of Q4_K and Q5_K: eight 6-bit factors of the scale and eight of the minimum, [n, 8] each.

    Bytes 0-3 and 4-7 hold the first four of each in their low 6 bits; their top 2 bits are the top bits of
    the last four, whose low nibbles fill bytes 8-11."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate((first & 63, last & 15 | first >> 6 << 4), axis=1)
    least = np.concatenate((second & 63, last >> 4 | second >> 6 << 4), axis=1)
    return scale, least


def _split_q4_k(blocks: Bytes) -> Parts:
    scale, least = _six_bit_pairs(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:].reshape(-1, 32)).reshape(-1, 256)
    return Parts(codes, _wide(_half(blocks, 0), scale), -_wide(_half(blocks, 2), least))


def _split_q5_k(blocks: Bytes) -> Parts:
    scale, least = _six_bit_pairs(blocks[:, 4:16])
    low = _nibbles(blocks[:, 48:].reshape(-1, 32)).reshape(-1, 256)
    high = np.unpackbits(blocks[:, None, 16:48], axis=1, bitorder="little").reshape(-1, 256)
    return Parts(low | high << 4, _wide(_half(blocks, 0), scale), -_wide(_half(blocks, 2), least))


def _split_q6_k(blocks: Bytes) -> Parts:
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 256)
    high = _pairs(blocks[:, 128:192].reshape(-1, 32)).reshape(-1, 256)
    factors = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return Parts(low | high << 4, _wide(_half(blocks, 208), factors), None)


# Types without `split` are listed so that their tensors can be placed and named in an error.
TENSOR_TYPES: dict[int, TensorType] = {
    row.number: row
    for row in (
        TensorType(0, "F32", 1, 4, float_type="fp32"),
        TensorType(1, "F16", 1, 2, float_type="fp16"),
        TensorType(2, "Q4_0", 32, 18, _split_q4_0, 4, 32, -8, "fp16"),
        TensorType(3, "Q4_1", 32, 20, _split_q4_1, 4, 32, 0, "fp16", has_offsets=True),
        TensorType(6, "Q5_0", 32, 22, _split_q5_0, 5, 32, -16, "fp16"),
        TensorType(7, "Q5_1", 32, 24, _split_q5_1, 5, 32, 0, "fp16", has_offsets=True),
        TensorType(8, "Q8_0", 32, 34, _split_q8_0, 8, 32, -128, "fp16"),
        TensorType(10, "Q2_K", 256, 84, _split_q2_k, 2, 16, 0, "fp32", has_offsets=True),
        TensorType(11, "Q3_K", 256, 110, _split_q3_k, 3, 16, -4, "fp32"),
        TensorType(12, "Q4_K", 256, 144, _split_q4_k, 4, 32, 0, "fp32", has_offsets=True),
        TensorType(13, "Q5_K", 256, 176, _split_q5_k, 5, 32, 0, "fp32", has_offsets=True),
        TensorType(14, "Q6_K", 256, 210, _split_q6_k, 6, 16, -32, "fp32"),
        TensorType(16, "IQ2_XXS", 256, 66),
        TensorType(17, "IQ2_XS", 256, 74),
        TensorType(18, "IQ3_XXS", 256, 98),
        TensorType(19, "IQ1_S", 256, 50),
        TensorType(20, "IQ4_NL", 32, 18),
        TensorType(21, "IQ3_S", 256, 110),
        TensorType(22, "IQ2_S", 256, 82),
        TensorType(23, "IQ4_XS", 256, 136),
        TensorType(24, "I8", 1, 1),
        TensorType(25, "I16", 1, 2),
        TensorType(26, "I32", 1, 4),
        TensorType(27, "I64", 1, 8),
        TensorType(28, "F64", 1, 8),
        TensorType(29, "IQ1_M", 256, 56),
        TensorType(30, "BF16", 1, 2, float_type="bf16"),
        TensorType(34, "TQ1_0", 256, 54),
        TensorType(35, "TQ2_0", 256, 66),
        TensorType(39, "MXFP4", 32, 17),
        TensorType(40, "NVFP4", 64, 36),
        TensorType(41, "Q1_0", 128, 18),
    )
}


def tensor_type(number: int, operation: str) -> TensorType:
    """The type with ggml's `number`; UnsupportedError beginning with `operation` when it is unknown."""
    kind = TENSOR_TYPES.get(number)
    if kind is None:
        raise UnsupportedError(f"{operation} has the unknown type {number}; lowbit reads {_readable_names()}")
    return kind


def check_readable(kind: TensorType, operation: str) -> None:
    """Raise UnsupportedError beginning with `operation` unless `kind` can be decoded."""
    if not kind.readable:
        raise UnsupportedError(
            f"{operation}: type {kind.name} has no decoder; lowbit reads {_readable_names()}: convert it"
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
    groups = kind.block // kind.group
    weights = parts.codes.reshape(-1, groups, kind.group).astype(np.float32)
    with np.errstate(all="ignore"):  # a damaged scale may be NaN or infinite; whoever uses the weights checks
        weights += np.float32(kind.base)
        weights *= parts.scales.astype(np.float32)[:, :, None]
        if parts.offsets is not None:
            weights += parts.offsets.astype(np.float32)[:, :, None]
    return weights.reshape(-1)


def split(raw: np.ndarray, kind: TensorType) -> Parts:
    """Take the bytes of whole blocks apart into codes, scales and offsets.

    raw: uint8, a multiple of kind.nbytes. Raises UnsupportedError for a type without a decoder.
    """
    check_readable(kind, "decode")
    assert kind.split is not None
    return kind.split(raw.reshape(-1, kind.nbytes))
