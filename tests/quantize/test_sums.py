"""Methods for sums of terms: scales are what they should be, objectives are met."""

import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats import parse_format
from lowbit.formats.scales import decode_scales
from lowbit.quantize import round_to_nearest
from lowbit.quantize.methods import parse_method
from lowbit.quantize.statistics import Statistics


@pytest.fixture(scope="module")
def case():
    """(weight [48, 128], Statistics of 512 correlated inputs)."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(128, 128)) * 0.2 + np.eye(128)
    x = (rng.normal(size=(512, 128)) @ mix * rng.gamma(1, 1, 128)).astype(np.float32)
    weight = rng.normal(size=(48, 128)).astype(np.float32)
    return weight, Statistics(x.T @ x / len(x), np.abs(x).max(axis=0), len(x))


def error(weight, matrix, hessian):
    rest = weight.astype(np.float64) - matrix.dequantize()
    return float(np.einsum("oi,ij,oj->", rest, hessian, rest))


@pytest.mark.parametrize(
    "method, name", [("bcq", "bcq2-g64"), ("bcq", "bcq3-g32"), ("ptqtp", "trit2-g64"), ("dbllm", "dual-g32")]
)
def test_each_objective_is_least_under_its_own(method, name, case):
    weight, statistics = case
    format = parse_format(name)
    made = {
        objective: parse_method(f"{method}:objective={objective}")(weight, format, statistics)
        for objective in ("weights", "diagonal", "hessian")
    }
    hessian = statistics.hessian
    full = {objective: error(weight, matrix, hessian) for objective, matrix in made.items()}
    loud = {objective: error(weight, matrix, np.diag(np.diag(hessian))) for objective, matrix in made.items()}
    assert full["hessian"] < 0.7 * full["diagonal"] < 0.7 * full["weights"]
    assert loud["diagonal"] < min(loud["weights"], loud["hessian"])
    np.testing.assert_array_equal(made["weights"].dequantize(), round_to_nearest(weight, format).dequantize())
    assert all(matrix.nbytes == made["weights"].nbytes for matrix in made.values())


@pytest.mark.parametrize("name", ["bcq2-g64-e8m0", "bcq3-g32-e8m0", "bcq4-row-e8m0"])
def test_shiftadd_has_powers_of_two_and_beats_rounded_ones(name, case):
    weight, statistics = case
    format = parse_format(name)
    matrix = parse_method("shiftadd")(weight, format, statistics)
    for term in matrix.terms:
        mantissas, _ = np.frexp(decode_scales(term.scales, "e8m0"))
        assert (mantissas == 0.5).all() and term.tensor_scale == 1.0
        assert set(np.unique(term.levels)) == {-1, 1}
    rounded = round_to_nearest(weight, format)
    assert error(weight, matrix, statistics.hessian) < 0.5 * error(weight, rounded, statistics.hessian)


@pytest.mark.parametrize(
    "method, name, remedy",
    [
        ("bcq", "int3-g64", "bcq3-g64"),
        ("ptqtp", "bcq2-g64", "trit2-g64"),
        ("shiftadd", "bcq3-g64", "bcq3-g64-e8m0"),
        ("shiftadd", "mxfp4", "bcq3-g64-e8m0"),
        ("dbllm", "int2-g64", "dual-g64"),
        ("bcq", "dual-g64", "bcq3-g64"),
        ("bcq", "bf16", "bcq3-g64"),
        ("bcq:objective=squares", "bcq2-g64", "weights, diagonal, hessian"),
    ],
)
def test_other_formats_are_refused_with_a_remedy(method, name, remedy, case):
    with pytest.raises(FormatError, match=remedy):
        parse_method(method)(case[0], parse_format(name), case[1])


def test_statistics_of_another_matrix_are_refused(case):
    with pytest.raises(FormatError, match="needs \\[64, 64\\]"):
        parse_method("bcq")(case[0][:, :64].copy(), parse_format("bcq2-g64"), case[1])
