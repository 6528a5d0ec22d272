"""bfloat16 weights with coded exponents: their bits to arrays and back, losslessly.

The sign and the 7 mantissa bits of a weight stay as they are. The 8 exponent bits carry about 2.6 bits of
information in language models, so they become a code of 3 bits that names one of the 7 most frequent of the
matrix; code 7 escapes to 4 bits that name one of the next 15, and escape 15 to a byte. docs/formats.md,
kind "entropy", is normative; the functions named `*_reference` say the same in NumPy.
Source of the idea: DFloat11, arXiv:2504.11651, which takes a Huffman code instead.
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed.layout import BLOCK_ROWS, block_count

try:  # The native module codes many times faster; the functions below define what it must produce.
    from lowbit._native import entropy_decode as _native_decode
    from lowbit._native import entropy_encode as _native_encode
except ImportError:
    _native_decode = _native_encode = None

INPUTS = 4  # of a record: two vectors of 2 inputs x 32 rows
RECORD = 2 * 3 * 8 + 2 * 64
DIRECT, ESCAPED = 7, 15
EXPONENTS = DIRECT + ESCAPED
TAIL = 64  # zero bytes that end the escapes, so that kernels may load whole vectors
_RARE = 15

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # codes, escapes, offsets, exponents


def codes_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Shape of the uint8 array of records."""
    return (block_count(out_features), -(-in_features // INPUTS), RECORD)


def encode(values: np.ndarray) -> Arrays:
    """Code the bits of bfloat16 weights, uint16 [out_features, in_features]; every pattern is kept.

    codes: uint8 [blocks, records, 176]; escapes: uint8 [n]; offsets: uint32 [2 * blocks + 1];
    exponents: uint8 [22]
    """
    return (_native_encode or encode_reference)(np.ascontiguousarray(values))


def decode(arrays: Arrays, out_features: int, in_features: int) -> np.ndarray:
    """The weights' bits, uint16 [out_features, in_features]. Raises FormatError if the arrays disagree."""
    try:
        return (_native_decode or decode_reference)(*arrays, out_features, in_features)
    except ValueError as error:
        raise FormatError(f"entropy term: {error}; the file is damaged") from error


def encode_reference(values: np.ndarray) -> Arrays:
    """`encode` in NumPy."""
    out_features, in_features = values.shape
    blocks, records, _ = codes_shape(out_features, in_features)
    counts = np.bincount((values >> 7 & 255).reshape(-1), minlength=256)
    order = np.argsort(-counts, kind="stable")[:EXPONENTS]
    exponents = np.where(counts[order] > 0, order, 0).astype(np.uint8)
    direct, escaped = np.full(256, DIRECT, np.uint8), np.full(256, _RARE, np.uint8)
    used = order[counts[order] > 0]
    direct[used[:DIRECT]] = np.arange(len(used[:DIRECT]))
    escaped[used[DIRECT:]] = np.arange(len(used[DIRECT:]))
    vectors = _to_vectors(values)
    inside = _to_vectors(np.ones(values.shape, np.uint16)).astype(bool)
    exponent = (vectors >> 7 & 255).astype(np.uint8)
    code = np.where(inside, direct[exponent], 0).astype(np.uint8)
    planes = [np.packbits(code >> bit & 1, axis=-1, bitorder="little") for bit in range(3)]
    mantissas = (vectors >> 8 & 128 | vectors & 127).astype(np.uint8)
    codes = np.concatenate(
        [np.stack(planes, axis=-2).reshape(blocks, records, 48), mantissas.reshape(blocks, records, 128)],
        axis=-1,
    )
    parts: list[np.ndarray] = []
    offsets = [0]
    for block in range(blocks):
        escapes = code[block] == DIRECT  # [records, 2, 64]
        nibbles = [escaped[exponent[block, :, v][escapes[:, v]]] for v in range(2)]
        both = np.zeros(max(map(len, nibbles)), np.uint8)
        both[: len(nibbles[0])] = nibbles[0]
        both[: len(nibbles[1])] |= nibbles[1] << 4
        rare = exponent[block][escapes]
        rare = rare[escaped[rare] == _RARE]
        for part in (both, rare):
            parts.append(part)
            offsets.append(offsets[-1] + len(part))
    return codes, np.concatenate([*parts, np.zeros(TAIL, np.uint8)]), np.array(offsets, np.uint32), exponents


def decode_reference(
    codes: np.ndarray,
    escapes: np.ndarray,
    offsets: np.ndarray,
    exponents: np.ndarray,
    out_features: int,
    in_features: int,
) -> np.ndarray:
    """`decode` in NumPy; raises ValueError."""
    blocks, records, _ = codes_shape(out_features, in_features)
    bits = np.unpackbits(codes[:, :, :48].reshape(blocks, records, 2, 3, 8), axis=-1, bitorder="little")
    code = bits[..., 0, :] | bits[..., 1, :] << 1 | bits[..., 2, :] << 2
    table = np.concatenate([exponents[:DIRECT], [0]]).astype(np.uint16)
    exponent = table[code]
    if offsets[0] or int(offsets[-1]) + TAIL != len(escapes) or (np.diff(offsets.astype(np.int64)) < 0).any():
        raise ValueError("its offsets do not span the escapes")
    table = np.concatenate([exponents[DIRECT:], [0]]).astype(np.uint16)
    for block in range(blocks):
        begin, middle, end = (int(n) for n in offsets[2 * block : 2 * block + 3])
        escaped = code[block] == DIRECT
        count = [int(escaped[:, v].sum()) for v in range(2)]
        if max(count) != middle - begin:
            raise ValueError(f"block {block} has {middle - begin} escapes, its codes need {max(count)}")
        nibbles = np.zeros(escaped.shape, np.uint8)
        nibbles[:, 0][escaped[:, 0]] = escapes[begin : begin + count[0]] & 15
        nibbles[:, 1][escaped[:, 1]] = escapes[begin : begin + count[1]] >> 4
        rare = escaped & (nibbles == _RARE)
        if int(rare.sum()) != end - middle:
            raise ValueError(f"block {block} has {end - middle} rare exponents, its codes need {rare.sum()}")
        exponent[block][escaped] = table[nibbles[escaped]]
        exponent[block][rare] = escapes[middle:end]
    mantissas = codes[:, :, 48:].reshape(blocks, records, 2, 64).astype(np.uint16)
    values = (mantissas & 128) << 8 | exponent << 7 | mantissas & 127
    rows = (
        values.reshape(blocks, records * INPUTS, BLOCK_ROWS).transpose(0, 2, 1).reshape(-1, records * INPUTS)
    )
    return np.ascontiguousarray(rows[:out_features, :in_features])


def _to_vectors(values: np.ndarray) -> np.ndarray:
    """[out_features, in_features] to [blocks, records, 2 vectors, 64 weights], padded with 0."""
    blocks, records, _ = codes_shape(*values.shape)
    padded = np.zeros((blocks * BLOCK_ROWS, records * INPUTS), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return (
        padded.reshape(blocks, BLOCK_ROWS, records, 2, 2)
        .transpose(0, 2, 3, 4, 1)
        .reshape(blocks, records, 2, 64)
    )
