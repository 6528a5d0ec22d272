"""m8 scales: fp16 numbers of super-groups times int8 factors, what they mean and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.packed import CodeTerm, PackedMatrix, pack_codes, pack_groups, unpack_groups


def m8_term(rng, bits, shape, offsets=False, levels=None):
    """Random codes; shape: (out_features, in_features, group_size, super_size)."""
    out_features, in_features, group_size, super_size = shape
    groups, supers = in_features // group_size, in_features // super_size if super_size else 1

    def wide():
        return pack_groups(rng.normal(size=(out_features, supers)).astype(np.float16))

    def factors():
        return pack_groups(rng.integers(-128, 128, (out_features, groups)).astype(np.int8))

    levels = np.arange(1 << bits) - (1 << bits >> 1) if levels is None else levels
    further = {"offsets": wide(), "offset_factors": factors()} if offsets else {}
    return CodeTerm(
        bits,
        np.asarray(levels, np.float32)[None],
        pack_codes(rng.integers(0, len(levels), (out_features, in_features)).astype(np.uint8), bits),
        wide(),
        "m8",
        group_size,
        tensor_scale=0.125,
        factors=factors(),
        super_size=super_size,
        **further,
    )


def test_what_m8_scales_mean(rng):
    term = m8_term(rng, 4, (35, 192, 32, 64), offsets=True)
    term.check(35, 192)
    wide = np.repeat(unpack_groups(term.scales, 35).astype(np.float64), 2, axis=1)
    scales = wide * unpack_groups(term.factors, 35) * 0.125
    np.testing.assert_array_equal(term.effective_scales(35), scales.astype(np.float32))
    offsets = np.repeat(unpack_groups(term.offsets, 35).astype(np.float64), 2, axis=1)
    offsets = np.repeat(offsets * unpack_groups(term.offset_factors, 35), 32, axis=1)
    levels = np.arange(-8, 8)[term.unpack(35, 192)]
    expected = (np.repeat(scales, 32, axis=1) * levels).astype(np.float32) + offsets.astype(np.float32)
    np.testing.assert_array_equal(term.dequantize(35, 192), expected)
    assert (
        PackedMatrix(35, 192, (term,)).nbytes == 64 * (192 * 4 // 8 + 2 * (6 + 2 * 3)) + 64
    )  # and 16 levels


def test_rows_move_with_their_factors(rng):
    term = m8_term(rng, 3, (40, 96, 16, 48), offsets=True)
    order = rng.permutation(40)
    np.testing.assert_array_equal(
        term.take_rows(order, 40, 96).dequantize(40, 96), term.dequantize(40, 96)[order]
    )


def test_malformed_terms_are_refused(rng):
    term = m8_term(rng, 4, (33, 192, 32, 96), offsets=True)
    for changes, message in (
        ({"factors": None}, "factors absent"),
        ({"scale_type": "fp16"}, "factors present"),
        ({"offset_factors": None}, "offset factors go with"),
        ({"offsets": None}, "offset factors go with"),
        ({"offsets": term.offsets.astype(np.float32)}, "float16 offsets"),
        ({"super_size": 48}, "super_size=48"),
        ({"super_size": 128}, "super_size=128"),
        ({"super_size": 0}, "scales are float16"),
        ({"group_size": 0}, "no whole rows"),
        ({"factors": term.factors[:, :1]}, "factors are int8"),
        ({"factors": term.factors.view(np.uint8)}, "factors are uint8"),
    ):
        with pytest.raises(FormatError, match=message):
            replace(term, **changes).check(33, 192)
