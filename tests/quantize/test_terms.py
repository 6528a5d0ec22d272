"""Sums of terms: binary-coded and trit planes."""

import numpy as np
import pytest

from lowbit.formats import Format, parse_format
from lowbit.quantize import round_to_nearest
from lowbit.quantize.binary_coded import fit_planes
from lowbit.quantize.round_to_nearest import quantize_with_error
from lowbit.quantize.stacked import assign, least_squares


def test_assign_is_the_best_of_all_combinations(rng):
    w = rng.standard_normal((16, 5)).astype(np.float32)
    scales = np.abs(rng.standard_normal((3, 5))).astype(np.float32)
    values, errors = assign(w, np.ones_like(w), scales, (-1.0, 1.0))
    every = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1)
    sums = np.einsum("pc,pn->cn", every, scales)
    best = np.square(w[None] - sums[:, None]).min(axis=0)
    np.testing.assert_allclose(np.square(w - (values * scales[:, None]).sum(0)), best, atol=1e-6)
    np.testing.assert_allclose(errors, best.sum(axis=0), rtol=1e-5)


def test_least_squares_solves_for_the_scales(rng):
    values = rng.choice([-1.0, 1.0], (2, 64, 7)).astype(np.float32)
    scales = np.abs(rng.standard_normal((2, 7))).astype(np.float32)
    w = (values * scales[:, None]).sum(axis=0)
    np.testing.assert_allclose(least_squares(w, np.ones_like(w), values, scales), scales, rtol=1e-5)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_planes_reproduce_what_they_can_express(planes, rng):
    scales = np.array([1.0, 0.5, 0.25, 0.125], np.float32)[:planes]
    w = (rng.choice([-1.0, 1.0], (planes, 20, 128)) * scales[:, None, None]).sum(axis=0).astype(np.float32)
    np.testing.assert_array_equal(round_to_nearest(w, Format.binary_coded(planes)).dequantize(), w)


def test_trits_reproduce_what_they_can_express(rng):
    w = (rng.integers(-1, 2, (20, 128)) + rng.integers(-1, 2, (20, 128)) / 4).astype(np.float32)
    _, error = quantize_with_error(w, Format.trit_planes(2))
    assert error < 1e-6


def test_one_plane_is_the_counted_mean_magnitude(rng):
    w = rng.standard_normal((128, 9)).astype(np.float32)
    codes, scales = fit_planes(w, 1, "fp32")
    mean = np.average(np.abs(w), axis=0, weights=0.75 + 0.25 * w**2 / np.square(w).mean(axis=0))
    np.testing.assert_allclose(scales[0], mean, rtol=1e-4)  # within the ridge
    np.testing.assert_array_equal(codes[0], w >= 0)


# Sums of P free planes do about as well as the best quantizer of 2^P levels for normal weights; J. Max 1960:
# 0.3634, 0.1175, 0.03454, 0.009497 for 1 to 4 bits. Two trit planes have 9 levels. Large weights count more
# in the fit, which costs some plain error.
@pytest.mark.parametrize(
    "name, limit",
    [
        ("bcq1-g128", 0.41),
        ("bcq2-g128", 0.127),
        ("bcq3-g128", 0.038),
        ("bcq4-g128", 0.0145),
        ("trit2-g128", 0.031),
    ],
)
def test_errors_on_normal_weights(name, limit, rng):
    w = rng.standard_normal((64, 512)).astype(np.float32)
    matrix, error = quantize_with_error(w, parse_format(name))
    measured = (
        np.square(matrix.dequantize() - w, dtype=np.float64).sum() / np.square(w, dtype=np.float64).sum()
    )
    assert error == pytest.approx(measured, rel=1e-4)
    assert error < limit


def test_zero_groups_stay_zero(rng):
    w = rng.standard_normal((3, 256)).astype(np.float32)
    w[1, :128] = 0
    for name in ("bcq3-g128", "trit2-g128"):
        assert not round_to_nearest(w, parse_format(name)).dequantize()[1, :128].any()
