"""The order of codes in memory: the NumPy definition, the native version, and what must not go unnoticed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.packed import (
    check_group_size,
    codes_shape,
    pack_codes,
    pack_groups,
    unpack_codes,
    unpack_groups,
)
from lowbit.packed.layout import PLANES, pack_codes_reference, unpack_codes_reference

BITS = list(PLANES)
SHAPES = [(1, 16), (1, 1), (16, 32), (17, 33), (32, 32), (33, 48), (50, 100), (64, 64), (5, 129)]


def every_code_somewhere(rng, shape, bits):
    codes = rng.integers(0, 1 << bits, shape, dtype=np.uint8)
    n = min(codes.size, 1 << bits)
    codes.reshape(-1)[:n] = np.arange(n, dtype=np.uint8)
    return codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_undoes_pack_and_native_equals_numpy(bits, shape, rng):
    codes = every_code_somewhere(rng, shape, bits)
    packed = pack_codes_reference(codes, bits)
    assert packed.shape == codes_shape(*shape, bits)
    np.testing.assert_array_equal(unpack_codes_reference(packed, *shape, bits), codes)
    np.testing.assert_array_equal(pack_codes(codes, bits), packed)
    np.testing.assert_array_equal(unpack_codes(packed, *shape, bits), codes)


@given(data=st.data(), bits=st.integers(1, 8), rows=st.integers(1, 70), columns=st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_unpack_undoes_pack_for_any_size(data, bits, rows, columns):
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, bits), rows, columns, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_single_code_lies_where_the_page_says(bits):
    """One code of all ones at each place of a block sets exactly `bits` bits, in the byte of its row."""
    for row in range(32):
        for column in range(32):
            codes = np.zeros((32, 32), np.uint8)
            codes[row, column] = (1 << bits) - 1
            packed = pack_codes(codes, bits)
            assert int(np.unpackbits(packed).sum()) == bits
            _, _, tile, byte = np.nonzero(packed)
            assert (tile == row // 16).all()
            assert (byte % 64 == 4 * (row % 16) + column % 4).all()


def test_nibbles_known_by_heart():
    """4 bits, row 17, input 37: block 0, chunk 1, tile 1, step 1 -> vector 0, high nibble, byte 4 * 1 + 1."""
    codes = np.zeros((20, 40), np.uint8)
    codes[17, 37] = 5
    packed = pack_codes(codes, 4)
    assert packed.shape == (1, 2, 2, 256)
    assert packed[0, 1, 1, 5] == 5 << 4
    packed[0, 1, 1, 5] = 0
    assert not packed.any()


@pytest.mark.parametrize("bits", BITS)
def test_a_flipped_bit_and_swapped_nibbles_are_seen(bits, rng):
    codes = rng.integers(0, 1 << bits, (32, 64), dtype=np.uint8)
    packed = pack_codes(codes, bits)
    flipped = packed.copy()
    flipped[0, 1, 0, 7] ^= 1
    assert (unpack_codes(flipped, 32, 64, bits) != codes).sum() == 1
    if bits > 1:
        swapped = (packed >> 4) | (packed << 4)
        assert (unpack_codes(swapped, 32, 64, bits) != codes).mean() > 0.3
    assert unpack_codes(np.zeros_like(packed), 32, 64, bits).max() == 0


def test_padding_has_code_zero():
    packed = pack_codes(np.full((17, 40), 15, np.uint8), 4)
    padded = unpack_codes(packed, 32, 64, 4)
    assert (padded[:17, :40] == 15).all()
    assert padded[17:].max() == 0 and padded[:, 40:].max() == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8])
def test_groups_round_trip(dtype, rng):
    values = rng.integers(0, 100, (37, 5)).astype(dtype)
    packed = pack_groups(values)
    assert packed.shape == (2, 5, 32) and packed.dtype == dtype
    assert packed[1, 3, 4] == values[36, 3]
    assert (packed[1, :, 5:] == 0).all()
    np.testing.assert_array_equal(unpack_groups(packed, 37), values)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(FormatError, match="code 16 does not fit 4 bits"):
        pack_codes(np.full((1, 16), 16, np.uint8), 4)
    with pytest.raises(FormatError, match="uint8"):
        pack_codes(np.zeros((1, 16), np.int32), 4)
    with pytest.raises(FormatError, match="bits=9"):
        pack_codes(np.zeros((1, 16), np.uint8), 9)
    with pytest.raises(FormatError, match=r"uint8 \[1, 1, 2, 256\]"):
        unpack_codes(np.zeros((1, 1, 2, 64), np.uint8), 1, 16, 4)


@pytest.mark.parametrize(
    "in_features, group_size, message",
    [
        (100, 32, "in_features=100 is not a multiple of group_size=32; use -row"),
        (576, 128, "in_features=576 is not a multiple of group_size=128; use -g96 or -g144"),
        (64, 24, "group_size=24 is not a multiple of 16; use -g16 or -g32"),
        (64, -1, "group_size=-1 is not a multiple of 16"),
    ],
)
def test_group_sizes_that_do_not_fit_name_the_nearest_that_do(in_features, group_size, message):
    with pytest.raises(FormatError, match=message):
        check_group_size(in_features, group_size)


@pytest.mark.parametrize("in_features, group_size", [(100, 0), (64, 64), (64, 16), (48, 48)])
def test_group_sizes_that_fit(in_features, group_size):
    check_group_size(in_features, group_size)
