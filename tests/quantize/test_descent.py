"""Coordinate descent: it never raises an error, and finds what exhaustive search finds."""

from itertools import pairwise, product

import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats import parse_format
from lowbit.quantize import low_rank, round_to_nearest
from lowbit.quantize.coded import Coded
from lowbit.quantize.descent import descend
from lowbit.quantize.gptq import gptq

FORMATS = (
    "int3-g32", "int4a-g64", "int2-g64", "nf4-g64", "mxfp4", "nvfp4", "bitmod3-g128", "ternary",
    "ternary-g64", "ternary-g32", "bcq2-g128", "bcq3-g64-e8m0", "trit2-g128", "int2-g16-m4", "int4-row",
    "int8-g64",
)  # fmt: skip


def problem(out_features=40, in_features=256, samples=400, seed=0):
    """Weights, and the Hessian of inputs whose channels differ in size and go together."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((in_features, in_features)) * 0.3 + np.eye(in_features)
    x = rng.standard_normal((samples, in_features)) @ mix * np.exp(rng.standard_normal(in_features))
    weight = rng.standard_normal((out_features, in_features)).astype(np.float32)
    return weight, (x.T @ x / samples).astype(np.float32)


def damped(hessian):
    return hessian.astype(np.float64) + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))


def row_errors(weight, matrix, hessian):
    """Output error of each row with the Hessian damped by 1%."""
    wide = damped(hessian)
    rest = weight.astype(np.float64) - matrix.dequantize()
    return np.einsum("oi,ij,oj->o", rest, wide, rest)


def falls(errors):
    return all(b <= a * (1 + 1e-5) for a, b in pairwise(errors))


@pytest.mark.parametrize("name", FORMATS)
def test_errors_only_fall(name):
    weight, hessian = problem()
    start = round_to_nearest(weight, parse_format(name))
    found = descend(weight, hessian, start)
    assert falls(found.fits) and falls(found.errors)
    assert found.matrix.format_name == name and found.matrix.nbytes == start.nbytes
    after = row_errors(weight, found.matrix, hessian)
    assert found.errors[-1] == pytest.approx(after.sum(), rel=1e-3)  # those of the codes that are stored
    assert after.sum() < 0.75 * row_errors(weight, start, hessian).sum()
    fitted = row_errors(weight, descend(weight, hessian, start, rounds=0).matrix, hessian)
    assert (after <= fitted * (1 + 1e-4)).all()  # row by row


@pytest.mark.parametrize("name", ["int3-g64", "ternary-g64", "bcq2-g128", "trit2-g128", "int4-g16-m4"])
def test_better_than_compensation_alone(name):
    weight, hessian = problem()
    format = parse_format(name)
    orders = [
        gptq(weight, hessian, format, order, scales="weights").matrix for order in ("given", "activation")
    ]
    best = min(row_errors(weight, matrix, hessian).sum() for matrix in orders)
    found = descend(weight, hessian, round_to_nearest(weight, format)).matrix
    assert row_errors(weight, found, hessian).sum() < 0.95 * best


def test_no_single_code_or_scale_can_be_improved():
    """At the end of many rounds every other code of every weight is worse."""
    weight, hessian = problem(3, 32, 100)
    found = descend(weight, hessian, round_to_nearest(weight, parse_format("int2-g16")), rounds=200).matrix
    least = row_errors(weight, found, hessian)
    values, scales = found.dequantize(), found.terms[0].effective_scales(3)
    for column, level in product(range(32), (-2, -1, 0, 1)):
        other = values.copy()
        other[:, column] = scales[:, column // 16] * level
        rest = weight - other
        error = np.einsum("oi,ij,oj->o", rest, damped(hessian), rest)
        assert (error >= least * (1 - 1e-4)).all()
    for factor in (0.99, 1.01):
        rest = weight - values * np.where(np.arange(32) < 16, factor, 1)
        error = np.einsum("oi,ij,oj->o", rest, damped(hessian), rest)
        assert (error >= least * (1 - 2e-3)).all()  # fp16 scales are 0.05% apart


def test_inputs_that_do_not_go_together_are_fitted_alone():
    """With a diagonal Hessian, each weight has the nearest level, and more rounds gain next to nothing."""
    weight, hessian = problem()
    diagonal = np.diag(np.diag(hessian))
    start = round_to_nearest(weight, parse_format("bcq2-g64"))
    fitted = descend(weight, diagonal, start, fit_rounds=30, rounds=0).matrix
    values = fitted.dequantize().reshape(40, 4, 64, 1)
    scales = [term.effective_scales(40)[:, :, None, None] for term in fitted.terms]
    sums = np.concatenate([a * scales[0] + b * scales[1] for a, b in product((-1, 1), repeat=2)], axis=3)
    distance = np.abs(weight.reshape(40, 4, 64, 1) - sums).min(axis=3, keepdims=True)
    np.testing.assert_allclose(np.abs(weight.reshape(values.shape) - values), distance, atol=1e-5)
    further = descend(weight, diagonal, fitted, fit_rounds=0).errors
    assert 0.99 * further[0] < further[-1] <= further[0]


@pytest.mark.parametrize(
    "name", ["int4a-g64", "bitmod3-g128", "trit2-g128", "int2-g16-m4", "nvfp4", "int8-row"]
)
def test_a_matrix_taken_apart_is_put_together_again(name):
    weight, _ = problem()
    matrix = round_to_nearest(weight, parse_format(name))
    coded = Coded(weight, matrix, "test")
    np.testing.assert_array_equal(coded.value.T, matrix.dequantize())
    for a, b in zip(coded.packed().terms, matrix.terms, strict=True):
        for (field, one), (_, other) in zip(a.arrays(), b.arrays(), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=field)


def test_unused_inputs_and_rows_of_zeros():
    weight, hessian = problem()
    weight[3] = 0
    hessian[:, [0, 17]] = hessian[[0, 17]] = 0
    matrix = descend(weight, hessian, round_to_nearest(weight, parse_format("int3-g64"))).matrix
    assert np.isfinite(matrix.dequantize()).all() and not matrix.dequantize()[3].any()
    rest = (weight - matrix.dequantize())[:, [0, 17]]
    assert np.square(rest).sum() < 0.2 * np.square(weight[:, [0, 17]]).sum()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hessian=np.eye(4)), "has 256 inputs"),
        (dict(hessian=np.full((256, 256), np.nan)), "not finite"),
        (dict(hessian=-np.eye(256)), "negative diagonal"),
        (dict(matrix="fp16"), "only terms of codes"),
        (dict(matrix="trit4-g64"), None),
        (dict(matrix="bcq8-g64"), None),
        (dict(weight=np.zeros((4, 256), np.float32)), "differ"),
        (dict(rank=2), "only terms of codes"),
    ],
)
def test_bad_input(change, message):
    weight, hessian = problem()
    name = change.pop("matrix", "int3-g64")
    matrix = round_to_nearest(weight, parse_format(name))
    if rank := change.pop("rank", 0):
        matrix = low_rank(weight, name, rank)
    given = dict(weight=weight, hessian=hessian, matrix=matrix, rounds=1, fit_rounds=1) | change
    if message is None:  # at the limit of what is taken
        assert falls(descend(**given).errors)
        return
    with pytest.raises(FormatError, match=message):
        descend(**given)
