"""GPTQ: its error identity, its special cases, and that it beats round-to-nearest where it should."""

import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats import parse_format
from lowbit.quantize.gptq import factorise, gptq
from lowbit.quantize.importance import round_by_importance
from lowbit.quantize.methods import parse_method
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.statistics import Statistics

FORMATS = (
    "int4-g64", "int3-g32", "int4a-g64", "int2-g64", "nf4-g64", "mxfp4", "nvfp4", "bitmod3-g128", "ternary",
    "ternary-g64", "bcq2-g128", "trit2-g128", "int4-g16-m4", "int8-row",
)  # fmt: skip

# With two bits and the given order, corrections pile up in weights that are still to come, and their groups'
# scales follow them: the reason for activation order with scales of the original weights.
DRIFTS = {("int2-g64", "given"), ("ternary-g64", "given")}


def problem(out_features=48, in_features=256, samples=400, seed=0):
    """Weights, and the Hessian of inputs whose channels differ in size and go together."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((in_features, in_features)) * 0.3 + np.eye(in_features)
    x = rng.standard_normal((samples, in_features)) @ mix * np.exp(rng.standard_normal(in_features))
    weight = rng.standard_normal((out_features, in_features)).astype(np.float32)
    return weight, (x.T @ x / samples).astype(np.float32)


def damped(hessian, damping=0.01):
    wide = hessian.astype(np.float64)
    return wide + damping * np.diag(wide).mean() * np.eye(len(wide))


def output_error(weight, matrix, hessian):
    rest = weight.astype(np.float64) - matrix.dequantize()
    return float(np.einsum("oi,ij,oj->", rest, hessian, rest))


@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("name", FORMATS)
def test_error_identity_and_gain(name, order):
    """The sum of e^2 is tr((W - Q) H (W - Q)^T), and the error is below round-to-nearest's."""
    weight, hessian = problem()
    format = parse_format(name)
    found = gptq(weight, hessian, format, order)
    assert found.matrix.format_name == format.name
    true = output_error(weight, found.matrix, damped(hessian))
    assert found.error == pytest.approx(true, rel=2e-3)
    plain = round_to_nearest(weight, format)
    assert found.matrix.nbytes == plain.nbytes
    if (name, order) not in DRIFTS:
        assert found.error < 0.9 * output_error(weight, plain, damped(hessian))


@pytest.mark.parametrize("name", FORMATS)
def test_diagonal_hessian_is_round_to_nearest(name):
    weight, hessian = problem()
    format = parse_format(name)
    found = gptq(weight, np.diag(np.diag(hessian)), format, scales="weights").matrix
    plain = round_to_nearest(weight, format)
    if format.terms == 1:
        for (field, a), (_, b) in zip(found.terms[0].arrays(), plain.terms[0].arrays(), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=field)
    np.testing.assert_allclose(found.dequantize(), plain.dequantize(), atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_diagonal_hessian_is_rounding_by_importance(name):
    """The cost of a column is then its diagonal, but for the last bits, in which searches may differ."""
    weight, hessian = problem()
    diagonal = np.diag(damped(np.diag(np.diag(hessian))))
    found = gptq(weight, np.diag(np.diag(hessian)), parse_format(name)).matrix
    other = round_by_importance(weight, parse_format(name), diagonal)
    errors = [np.square(matrix.dequantize() - weight) @ diagonal for matrix in (found, other)]
    assert errors[0].sum() == pytest.approx(errors[1].sum(), rel=2e-3)
    assert np.mean(found.dequantize() == other.dequantize()) > 0.95


@pytest.mark.parametrize("lazy", [1, 7, 100, 256])
def test_independent_of_blocks(lazy):
    """Up to float32 rounding, which may flip a weight that lies between two levels."""
    weight, hessian = problem()
    format = parse_format("int3-g64")
    usual, other = gptq(weight, hessian, format), gptq(weight, hessian, format, lazy=lazy)
    assert other.error == pytest.approx(usual.error, rel=0.02)
    same = np.mean(usual.matrix.dequantize() == other.matrix.dequantize())
    assert same > 0.9


def test_scale_of_the_hessian_does_not_matter():
    weight, hessian = problem()
    format = parse_format("int4-g64")
    a, b = gptq(weight, hessian, format), gptq(weight, hessian * np.float32(1024), format)
    np.testing.assert_array_equal(a.matrix.dequantize(), b.matrix.dequantize())
    assert b.error == pytest.approx(1024 * a.error, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["int2-g32", "int3a-g32", "nf4-g64", "bitmod3-g64", "bcq2-g64", "int3-g16-m4"]
)
def test_scales_by_cost_and_refit_lower_the_output_error(name):
    weight, hessian = problem(seed=5)
    format = parse_format(name)
    statistics = Statistics(hessian, np.ones(256, np.float32), 400)
    methods = ("gptq:scales=weights", "gptq", "gptq:refit=2")
    errors = [output_error(weight, parse_method(m)(weight, format, statistics), hessian) for m in methods]
    assert errors[1] < 0.97 * errors[0] and errors[2] < 0.97 * errors[1]


def test_matrices_of_one_input_share_the_factor():
    weight, hessian = problem()
    format = parse_format("int4-g64")
    statistics = Statistics(hessian, np.ones(256, np.float32), 400)
    choice = parse_method("gptq:order=activation")
    first, again = (choice(weight, format, statistics) for _ in range(2))
    alone = gptq(weight, hessian, format, "activation").matrix
    shared = gptq(weight, factorise(hessian, "activation", 0.01), format, "activation").matrix
    for matrix in (first, again, shared):
        np.testing.assert_array_equal(matrix.dequantize(), alone.dequantize())
    assert len(statistics._kept) == 1


def test_unused_and_dependent_channels():
    """Channels that never fire, and fewer samples than channels: a singular Hessian."""
    weight, _ = problem()
    x = np.random.default_rng(1).standard_normal((20, 256)).astype(np.float32)
    x[:, [0, 17, 255]] = 0
    found = gptq(weight, x.T @ x, parse_format("int4-g64"), "activation")
    assert np.isfinite(found.matrix.dequantize()).all()
    assert np.linalg.norm(x @ (weight - found.matrix.dequantize()).T) < 0.2 * np.linalg.norm(x @ weight.T)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(order="random"), "order='random'"),
        (dict(scales="best"), "scales='best'"),
        (dict(hessian=np.eye(4)), "needs \\[256, 256\\]"),
        (dict(hessian=np.full((256, 256), np.nan)), "not finite"),
        (dict(hessian=-np.eye(256)), "negative diagonal"),
        (dict(weight=np.full((4, 256), np.nan, np.float32)), "NaN"),
        (dict(weight=np.zeros((4, 256))), "float64"),
        (dict(format=parse_format("bf16")), "no scales"),
        (dict(format=parse_format("int4-g96")), "96"),
    ],
)
def test_bad_input(change, message):
    weight, hessian = problem()
    given = dict(weight=weight, hessian=hessian, format=parse_format("int4-g64")) | change
    with pytest.raises(FormatError, match=message):
        gptq(**given)
