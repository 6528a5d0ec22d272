"""AWQ: never worse than round-to-nearest on its own error, better where channels differ."""

import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats import parse_format
from lowbit.quantize.awq import awq
from lowbit.quantize.round_to_nearest import round_to_nearest


def problem(loud=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((300, 128)).astype(np.float32)
    x[:, rng.choice(128, loud, replace=False)] *= 20
    weights = [rng.standard_normal((rows, 128)).astype(np.float32) for rows in (32, 16)]
    return weights, x


@pytest.mark.parametrize("name", ["int3-g64", "int4-g32", "nf4-g64", "int3a-g64"])
def test_error_is_what_it_says(name):
    weights, x = problem()
    format = parse_format(name)
    found = awq(weights, x.T @ x, format)
    assert found.error <= found.unscaled_error
    assert found.error < 0.8 * found.unscaled_error
    for factors, error in ((found.factors, found.error), (np.ones(128, np.float32), found.unscaled_error)):
        true = 0.0
        for weight in weights:
            rounded = round_to_nearest(weight * factors, format).dequantize()
            true += np.square((x / factors) @ rounded.T - x @ weight.T, dtype=np.float64).sum()
        assert error == pytest.approx(true, rel=1e-3)


def test_nothing_to_gain():
    """Where one factor serves all channels alike, s = 1 must remain possible."""
    weights, _ = problem()
    found = awq(weights, np.eye(128), parse_format("int4-g32"))
    assert found.exponent == 0 and (found.factors == 1).all()
    silent = awq(weights, np.zeros((128, 128)), parse_format("int4-g32"))
    assert silent.error == 0 and np.isfinite(silent.factors).all()


def test_bad_input():
    weights, _ = problem()
    with pytest.raises(FormatError, match="same inputs"):
        awq(weights, np.eye(64), parse_format("int4-g32"))
    with pytest.raises(FormatError, match="not finite"):
        awq(weights, np.full((128, 128), np.inf), parse_format("int4-g32"))
