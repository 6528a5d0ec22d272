"""Rotations are orthogonal, as flat as their size allows, and spread outliers."""

import numpy as np
import pytest

from lowbit.formats import parse_format
from lowbit.quantize.rotation import make_rotation
from lowbit.quantize.round_to_nearest import round_to_nearest


@pytest.mark.parametrize("n", [1, 2, 3, 9, 12, 16, 20, 28, 36, 46, 48, 64, 90, 96, 100, 160, 288, 576, 896])
def test_orthogonal(n):
    rotation = make_rotation(n)
    dense = rotation(np.eye(n, dtype=np.float32)).astype(np.float64)
    np.testing.assert_allclose(dense @ dense.T, np.eye(n), atol=2e-6)
    flat = dense**2 * n
    if n in (
        9,
        46,
        90,
        3,
        100,
    ):  # no Hadamard matrix, or none by Paley: a cosine is at most sqrt(2) too large
        assert flat.max() < 2.001
    else:
        np.testing.assert_allclose(flat, 1, rtol=1e-5)
    assert len(rotation.left) * len(rotation.right) == n
    assert len(rotation.left) + len(rotation.right) <= max(4 * n**0.5, 192)


def test_signs():
    plain, random, again = make_rotation(64, None), make_rotation(64, 1), make_rotation(64, 1)
    assert (plain.signs == 1).all() and (random.signs == -1).any()
    np.testing.assert_array_equal(random.signs, again.signs)
    x = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
    assert random(x).shape == x.shape
    np.testing.assert_allclose(random(x)[1, 2], random(x[1, 2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [288, 576])
def test_outliers_cost_less_after_a_rotation(n):
    """Loud channels ruin the groups they are in; turned with their inputs, they are spread over all."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, n)).astype(np.float32)
    weight[:, rng.choice(n, n // 32, replace=False)] *= 30
    format = parse_format("int4-g32")

    def error(w):
        return float(np.square(w - round_to_nearest(w, format).dequantize()).sum())

    turned = make_rotation(n)(weight)
    assert np.vdot(turned, turned) == pytest.approx(np.vdot(weight, weight), rel=1e-5)
    assert error(turned) < 0.6 * error(weight)
