"""Base-3 codes and multipliers against plain codes of the same weights: equal to the bit.

The integers are the same, so the results are. Runs itself on the other instruction sets and compares digests.
"""

import hashlib
import json

import numpy as np
import pytest

from lowbit import _native
from lowbit.packed import pack_codes
from lowbit.packed.layout import pack_groups

SHAPES = [(64, 320), (33, 64), (40, 96), (1, 100), (65, 48), (96, 1088), (31, 1000), (32, 20), (5, 7)]
TOKENS = [1, 2, 9]


def pack_base3(codes):
    """uint8 [blocks, vectors, 2, 64] of codes below 3 [out_features, in_features] (docs/formats.md)."""
    rows, inputs = -(-codes.shape[0] // 32) * 32, -(-codes.shape[1] // 20) * 20
    padded = np.ones((rows, inputs), np.uint8)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    # [blocks, tile, row, vector, step of the vector, input of the step] -> [blocks, vector, tile, row, input]
    digits = padded.reshape(-1, 2, 16, inputs // 20, 5, 4).transpose(4, 0, 3, 1, 2, 5).astype(np.int64)
    n = digits[0] + 3 * digits[1] + 9 * digits[2] + 27 * digits[3]
    packed = np.where(n < 64, 64 * digits[4] + n, 192 + 3 * (n - 64) + digits[4])
    return packed.astype(np.uint8).reshape(rows // 32, inputs // 20, 2, 64)


def pack_multipliers(multipliers):
    """uint8 [blocks, groups, 16] of values 0..15 [out_features, groups]."""
    grouped = pack_groups(multipliers)
    return grouped[..., :16] | grouped[..., 16:] << 4


def random_scales(rng, out_features, groups):
    return pack_groups(rng.uniform(0.5, 2, (out_features, groups)).astype(np.float16))


def base3_pair(rng, shape, levels, group_size=0, **extra):
    """The same ternary weights stored base 3 and as 2-bit planes."""
    out_features, in_features = shape
    codes = rng.integers(0, 3, shape).astype(np.uint8)
    groups = in_features // group_size if group_size else 1
    scales = random_scales(rng, out_features, groups)
    arrays = {key: pack_groups(make(out_features, groups)) for key, make in extra.items()}
    pair = []
    for packing, stored in (("base3", pack_base3(codes)), ("planes", pack_codes(codes, 2))):
        native = _native.Matrix(out_features, in_features)
        native.add_code_term(
            2, stored, "fp16", scales, group_size, np.float32([levels]), 0.5, packing=packing, **arrays
        )
        pair.append(native)
    return pair


def multiplied_pair(rng, shape, bits, levels, size, super_size):
    """Codes with multipliers, and bytes that hold the products of level and multiplier."""
    out_features, in_features = shape
    codes = rng.integers(0, len(levels), shape).astype(np.uint8)
    multipliers = rng.integers(0, 16, (out_features, in_features // size)).astype(np.uint8)
    groups = in_features // super_size if super_size else 1
    scales = random_scales(rng, out_features, groups)
    native = _native.Matrix(out_features, in_features)
    native.add_code_term(
        bits,
        pack_codes(codes, bits),
        "fp16",
        scales,
        super_size,
        np.float32([levels]),
        0.5,
        multipliers=pack_multipliers(multipliers),
        multiplier_size=size,
    )
    products = np.array(levels, np.int64)[codes] * np.repeat(multipliers.astype(np.int64), size, axis=1)
    plain = _native.Matrix(out_features, in_features)
    everything = np.arange(-128, 128, dtype=np.float32)[None]
    stored = pack_codes((products + 128).astype(np.uint8), 8)
    plain.add_code_term(8, stored, "fp16", scales, super_size, everything, 0.5)
    return native, plain


def cases():
    """(name, matrix, matrix that must give the same bits)."""
    rng = np.random.default_rng(11)
    for shape in SHAPES:
        for levels in ((-1, 0, 1), (0, 2, 4), (-1, 0, 3), (-0.3, 0.1, 0.7)):
            yield f"base3 {levels} {shape}", *base3_pair(rng, shape, levels)
    for group_size in (64, 320):
        yield f"base3 groups of {group_size}", *base3_pair(rng, (64, 960), (-1, 0, 1), group_size)
    zeros = {"zero_points": lambda *s: rng.integers(0, 3, s).astype(np.uint8)}
    yield "base3 zero points", *base3_pair(rng, (40, 384), (0, 1, 2), 128, **zeros)
    offsets = {"offsets": lambda *s: rng.normal(size=s).astype(np.float16)}
    yield "base3 offsets", *base3_pair(rng, (40, 384), (-1, 0, 1), 64, **offsets)
    for bits, levels in (
        (1, (-1, 1)),
        (2, (-2, -1, 0, 1)),
        (2, (-3, -1, 1, 3)),
        (2, (0, 1, 2, 3)),
        (3, range(-4, 4)),
        (3, (0, 1, 2, 4, -8, -5, -3, -1)),
        (4, range(-8, 8)),
        (4, range(-8, 0)),
        (4, (0, 1, 2, 3, 4, 5, 6, 8, 0, -1, -2, -3, -4, -5, -6, -8)),
        (5, range(-8, 8)),
        (6, (-8, 3, 5)),
    ):
        for size, super_size in ((16, 64), (32, 192), (16, 0), (32, 0), (64, 64), (48, 192), (192, 0)):
            yield (
                f"multipliers {bits} {levels} {size} {super_size}",
                *multiplied_pair(rng, (65, 576), bits, levels, size, super_size),
            )
    for in_features in (16, 48, 80, 112, 208):
        yield f"multipliers {in_features}", *multiplied_pair(rng, (33, in_features), 4, range(-8, 8), 16, 0)


def inputs(matrix, tokens):
    rng = np.random.default_rng(tokens)
    x = rng.normal(size=(tokens, matrix.shape[1])).astype(np.float32)
    x[:, :3] *= 50
    x[0, -5:] *= -50
    return x


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_equal_to_plain_codes(tokens, activation_bits):
    for name, matrix, plain in cases():
        x = inputs(matrix, tokens)
        found = _native.matmul(x, matrix, activation_bits)
        np.testing.assert_array_equal(found, _native.matmul(x, plain, activation_bits), err_msg=name)
        assert np.abs(found).max() > 0, name


def test_dequantize_equals_plain_codes():
    for name, matrix, plain in cases():
        np.testing.assert_allclose(
            _native.dequantize(matrix), _native.dequantize(plain), rtol=1e-6, err_msg=name
        )


def test_every_byte_of_base_3(rng):
    """All 243 groups of five codes, in every place of a row."""
    codes = np.array(np.unravel_index(np.arange(243), (3,) * 5), np.uint8)  # [step, 243]
    steps = np.repeat(codes.T.reshape(-1)[:, None], 4, axis=1).reshape(1, -1)  # [1, 243 * 20]
    matrix, plain = _native.Matrix(1, steps.shape[1]), _native.Matrix(1, steps.shape[1])
    levels, scale = np.float32([[-1, 0, 1]]), np.ones((1, 1, 32), np.float16)
    packed = pack_base3(steps)
    assert len(np.unique(packed[0, :, 0, 0])) == 243
    matrix.add_code_term(2, packed, "fp16", scale, 0, levels, packing="base3")
    plain.add_code_term(2, pack_codes(steps, 2), "fp16", scale, 0, levels)
    np.testing.assert_array_equal(_native.dequantize(matrix), steps.astype(np.float32) - 1)
    for tokens in TOKENS:
        x = inputs(matrix, tokens)
        np.testing.assert_array_equal(_native.matmul(x, matrix), _native.matmul(x, plain))


def test_the_test_sees_one_flipped_code_and_one_multiplier(rng):
    codes = rng.integers(0, 3, (32, 320)).astype(np.uint8)
    results = []
    for flip in (False, True):
        codes[7, 311] = (codes[7, 311] + flip) % 3
        native = _native.Matrix(32, 320)
        scale = np.ones((1, 1, 32), np.float16)
        native.add_code_term(
            2, pack_base3(codes), "fp16", scale, 0, np.float32([[-1, 0, 1]]), packing="base3"
        )
        results.append(_native.matmul(np.ones((1, 320), np.float32), native))
    assert [int(i) for i in np.flatnonzero(results[0] != results[1])] == [7]
    multipliers = rng.integers(1, 15, (32, 20)).astype(np.uint8)
    results = []
    for step in (0, 1):
        multipliers[20, 19] += step
        native = _native.Matrix(32, 320)
        native.add_code_term(
            2,
            pack_codes(codes, 2),
            "fp16",
            np.ones((1, 1, 32), np.float16),
            0,
            np.float32([[1, 2, 3]]),
            multipliers=pack_multipliers(multipliers),
            multiplier_size=16,
        )
        results.append(_native.matmul(np.ones((1, 320), np.float32), native))
    assert [int(i) for i in np.flatnonzero(results[0] != results[1])] == [20]


def digests():
    found = {}
    for name, matrix, _ in cases():
        digest = hashlib.sha256()
        for tokens in (1, 7):
            for bits in (8, 16):
                digest.update(_native.matmul(inputs(matrix, tokens), matrix, bits).tobytes())
        found[name] = digest.hexdigest()
    return found


def test_instruction_sets_agree_to_the_bit(same_on_every_isa):
    same_on_every_isa(__file__, digests())


def test_bad_packings_are_named():
    levels, scales = np.float32([[-1, 0, 1]]), np.ones((1, 1, 32), np.float16)

    def add(bits=2, codes=4 * 128, group_size=0, levels=levels, scales=scales, **more):
        native = _native.Matrix(32, 64)
        native.add_code_term(bits, np.zeros(codes, np.uint8), "fp16", scales, group_size, levels, **more)

    add(packing="base3")
    with pytest.raises(ValueError, match="planes, base3"):
        add(packing="base4")
    with pytest.raises(ValueError, match="bits=3"):
        add(bits=3, packing="base3")
    with pytest.raises(ValueError, match="codes has 100 bytes"):
        add(codes=100, packing="base3")
    with pytest.raises(ValueError, match="group_size 0 or a multiple of 64"):
        add(group_size=32, scales=np.ones((1, 2, 32), np.float16), packing="base3")
    with pytest.raises(ValueError, match="2 to 3"):
        add(levels=np.ones((1, 4), np.float32), packing="base3")
    multipliers = np.ones((1, 4, 16), np.uint8)
    add(codes=512, multipliers=multipliers, multiplier_size=16)
    with pytest.raises(ValueError, match="multiplier_size=24"):
        add(codes=512, multipliers=multipliers, multiplier_size=24)
    with pytest.raises(ValueError, match="group_size=32"):
        scales = np.ones((1, 2, 32), np.float16)
        add(codes=512, multipliers=multipliers, multiplier_size=16, group_size=32, scales=scales)
    with pytest.raises(ValueError, match="multipliers has 64 bytes"):
        add(codes=512, multipliers=multipliers, multiplier_size=32)
    with pytest.raises(ValueError, match="-8 to 8"):
        add(codes=512, levels=np.float32([[-9, 0, 1]]), multipliers=multipliers, multiplier_size=16)
    with pytest.raises(ValueError, match="without zero points"):
        zeros = np.zeros((1, 1, 32), np.uint8)
        add(codes=512, multipliers=multipliers, multiplier_size=16, zero_points=zeros)


if __name__ == "__main__":
    print(json.dumps({"isa": _native.isa(), **digests()}))
