"""Base-3 packing: every byte, the place of every code, native against NumPy, damaged bytes."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.packed import base3_shape, pack_base3, unpack_base3
from lowbit.packed.base3 import pack_base3_reference, unpack_base3_reference

SHAPES = [(1, 1), (1, 20), (16, 20), (17, 21), (32, 40), (33, 64), (50, 100), (5, 129), (64, 1024), (40, 19)]


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_undoes_pack_and_native_equals_numpy(shape, rng):
    codes = rng.integers(0, 3, shape, dtype=np.uint8)
    packed = pack_base3_reference(codes)
    assert packed.shape == base3_shape(*shape) and packed.max() <= 242
    np.testing.assert_array_equal(unpack_base3_reference(packed, *shape), codes)
    np.testing.assert_array_equal(pack_base3(codes), packed)
    np.testing.assert_array_equal(unpack_base3(packed, *shape), codes)


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 70), columns=st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_unpack_undoes_pack_for_any_size(seed, rows, columns):
    codes = np.random.default_rng(seed).integers(0, 3, (rows, columns), dtype=np.uint8)
    np.testing.assert_array_equal(unpack_base3(pack_base3(codes), rows, columns), codes)


def test_all_243_bytes():
    """Row r, input 4 i of the first vector is code i of its byte: all combinations, all bytes once."""
    combinations = np.array(list(product(range(3), repeat=5)), np.uint8)
    codes = np.ones((243, 20), np.uint8)
    codes[:, ::4] = combinations
    packed = pack_base3(codes)
    seen = set()
    for row, (c0, c1, c2, c3, c4) in enumerate(combinations.astype(int)):
        n = c0 + 3 * c1 + 9 * c2 + 27 * c3
        byte = packed[row // 32, 0, row % 32 // 16, 4 * (row % 16)]
        assert byte == (64 * c4 + n if n < 64 else 192 + 3 * (n - 64) + c4)
        seen.add(int(byte))
    assert seen == set(range(243))
    np.testing.assert_array_equal(unpack_base3(packed, 243, 20), codes)


@pytest.mark.parametrize("unpack", [unpack_base3, unpack_base3_reference])
def test_every_byte_unpacks_and_damaged_ones_show(unpack):
    """Bytes above 242 never occur in a good file; they give a code of 3, which no ternary table has."""
    packed = np.zeros((8, 1, 2, 64), np.uint8)
    for byte in range(256):
        packed[byte // 32, 0, byte % 32 // 16, 4 * (byte % 16)] = byte
    codes = unpack(packed, 256, 20)[:, ::4].astype(int)
    assert codes[:243].max() <= 2
    np.testing.assert_array_equal(codes[243:, 3], 3)
    assert len(np.unique(codes, axis=0)) == 256


def test_a_vector_known_by_heart():
    """Row 18, input 33: block 0, vector 1, tile 1, byte 4 * 2 + 1; step 8 = 5 + 3.

    Padding: n = 1 + 3 + 9 + 27 = 40, byte 64 + 40. With c3 = 2 n = 67, byte 192 + 3 * 3 + 1.
    """
    codes = np.ones((20, 40), np.uint8)
    codes[18, 33] = 2
    packed = pack_base3(codes)
    assert packed.shape == (1, 2, 2, 64)
    assert packed[0, 1, 1, 9] == 202
    packed[0, 1, 1, 9] = 104
    assert (packed == 104).all()


def test_padding_has_code_one_and_a_changed_digit_is_seen(rng):
    packed = pack_base3(np.zeros((17, 41), np.uint8))
    padded = unpack_base3(packed, 32, 60)
    assert (padded[:17, :41] == 0).all() and (padded[17:] == 1).all() and (padded[:, 41:] == 1).all()
    codes = rng.integers(0, 2, (32, 40), dtype=np.uint8)
    changed = pack_base3(codes)
    changed[0, 1, 0, 5] += 9  # all codes are below 2, so n < 64 before and after
    assert (unpack_base3(changed, 32, 40) != codes).sum() == 1


def test_what_is_not_ternary_is_refused():
    with pytest.raises(FormatError, match="code 3; base-3 codes are 0, 1 or 2"):
        pack_base3(np.full((1, 20), 3, np.uint8))
    with pytest.raises(FormatError, match="uint8"):
        pack_base3(np.zeros((1, 20), np.int8))
    with pytest.raises(FormatError, match=r"uint8 \[1, 2, 2, 64\]"):
        unpack_base3(np.zeros((1, 1, 2, 64), np.uint8), 1, 21)
