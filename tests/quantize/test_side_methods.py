"""Methods that keep something in 16 bit beside the codes, or everything."""

import numpy as np
import pytest

from lowbit.errors import FormatError, RequestError
from lowbit.formats import parse_format
from lowbit.quantize import round_to_nearest
from lowbit.quantize.descent import descent
from lowbit.quantize.gptq import damp
from lowbit.quantize.kept_columns import keep_columns
from lowbit.quantize.methods import parse_method
from lowbit.quantize.statistics import Statistics

INT2, INT8 = parse_format("int2-g32"), parse_format("int8-row")


@pytest.fixture(scope="module")
def case():
    """(weight [48, 96], Statistics of 400 correlated inputs, of which two are loud)."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(96, 96)) * 0.1 + np.eye(96)
    x = (rng.normal(size=(400, 96)) @ mix).astype(np.float32)
    x[:, [7, 50]] *= 20
    weight = rng.normal(size=(48, 96)).astype(np.float32)
    return weight, Statistics(x.T @ x / len(x), np.abs(x).max(axis=0), len(x))


def error(weight, matrix, hessian):
    """Output error with the Hessian damped by 1%."""
    rest = weight.astype(np.float64) - matrix.dequantize()
    return float(np.einsum("oi,ij,oj->", rest, damp(hessian, 0.01, ""), rest))


def test_llmint8_keeps_the_loud_inputs(case):
    weight, statistics = case
    matrix = parse_method("llmint8:threshold=10")(weight, INT8, statistics)
    assert matrix.terms[1].columns.tolist() == [7, 50] == matrix.excluded.tolist()
    np.testing.assert_array_equal(matrix.dequantize()[:, [7, 50]], weight[:, [7, 50]].astype(np.float16))
    plain = round_to_nearest(weight, INT8)
    assert error(weight, matrix, statistics.hessian) < 0.2 * error(weight, plain, statistics.hessian)


def test_llmint8_without_outliers_is_round_to_nearest(case):
    matrix = parse_method("llmint8:threshold=inf")(case[0], INT8, case[1])
    plain = round_to_nearest(case[0], INT8)
    assert len(matrix.terms) == 1 and matrix.format_name == plain.format_name
    np.testing.assert_array_equal(matrix.terms[0].codes, plain.terms[0].codes)
    everything = parse_method("llmint8:threshold=0")(case[0], INT8, case[1])
    np.testing.assert_array_equal(everything.dequantize(), case[0].astype(np.float16))


def test_salient_inputs_make_up_for_the_others(case):
    weight, statistics = case
    matrix = parse_method("salient:fraction=0.05")(weight, INT2, statistics)
    columns = matrix.terms[1].columns.astype(int)
    assert len(columns) == round(0.05 * 96) and {7, 50} <= set(columns.tolist())
    left = error(weight, matrix, statistics.hessian)
    assert left < 0.9 * error(weight, descent(weight, INT2, statistics), statistics.hessian)
    # The kept inputs are at the minimum given the codes of the others: what pulls there is fp16's rounding.
    damped, decoded = damp(statistics.hessian, 0.01, ""), matrix.dequantize()
    pull = np.abs((weight - decoded) @ damped)[:, columns]
    steps = 2.0**-11 * np.abs(decoded[:, columns])
    assert (pull <= steps @ np.abs(damped[np.ix_(columns, columns)]) + 1e-3).all()
    more = parse_method("salient:fraction=0.2")(weight, INT2, statistics)
    assert error(weight, more, statistics.hessian) < left


def test_kept_columns_in_formats_without_zero(case):
    weight, statistics = case
    format = parse_format("bcq2-g32")
    matrix = keep_columns(weight, format, statistics.hessian, np.array([0, 7, 95]))
    assert error(weight, matrix, statistics.hessian) < error(
        weight, descent(weight, format, statistics), statistics.hessian
    )


@pytest.mark.parametrize("base", ["rtn", "gptq", "descent"])
@pytest.mark.parametrize("objective", ["weights", "diagonal", "hessian"])
def test_the_error_falls_with_the_rank(objective, base, case):
    weight, statistics = case
    hessian = {
        "weights": np.eye(96, dtype=np.float32),
        "diagonal": np.diag(np.diag(statistics.hessian)),
        "hessian": statistics.hessian,
    }[objective]
    errors = []
    for rank in (1, 4, 16, 48):
        method = parse_method(f"lorc:base={base},rank={rank},objective={objective}")
        matrix = method(weight, INT2, statistics)
        assert matrix.terms[-1].rank == rank and matrix.format_name == f"int2-g32+rank{rank}"
        errors.append(error(weight, matrix, hessian))
    start = error(weight, parse_method(base)(weight, INT2, statistics), hessian)
    assert start > errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-4 * start  # the full rank leaves fp16's rounding


def test_lorc_objectives_and_rounds(case):
    weight, statistics = case

    def made(options):
        matrix = parse_method(f"lorc:base=rtn,rank=4,{options}")(weight, INT2, statistics)
        return error(weight, matrix, statistics.hessian)

    assert made("objective=hessian") < made("objective=diagonal") < made("objective=weights")
    assert made("rounds=4") < made("rounds=2") < made("rounds=1")


def test_spqr_entries_are_few_and_at_their_best(case):
    weight, statistics = case
    matrix = parse_method("spqr:fraction=0.01")(weight, INT2, statistics)
    rows, columns = matrix.terms[1].places()
    assert len(rows) == round(0.01 * weight.size)
    left = error(weight, matrix, statistics.hessian)
    assert left < 0.95 * error(weight, descent(weight, INT2, statistics), statistics.hessian)
    pull = (weight - matrix.dequantize()) @ damp(statistics.hessian, 0.01, "")
    assert np.abs(pull[rows, columns]).max() < 0.02 * np.abs(pull).max()
    more = parse_method("spqr:fraction=0.05")(weight, INT2, statistics)
    assert error(weight, more, statistics.hessian) < left


def test_lossless_keeps_every_bit(case):
    weight, df11 = case[0], parse_format("df11")
    bfloat = round_to_nearest(weight, parse_format("bf16")).dequantize()
    np.testing.assert_array_equal(parse_method("lossless")(bfloat, df11).dequantize(), bfloat)
    np.testing.assert_array_equal(parse_method("lossless:rounded=yes")(weight, df11).dequantize(), bfloat)
    with pytest.raises(FormatError, match="lossless:rounded=yes"):
        parse_method("lossless")(weight, df11)


@pytest.mark.parametrize(
    "method, format, message",
    [
        ("llmint8", "bf16", "no scales"),
        ("salient", "fp32", "no scales"),
        ("salient:fraction=0", "int2-g32", "fraction=0.0"),
        ("salient:fraction=1", "int2-g32", "fraction=1.0"),
        ("spqr", "df11", "no scales"),
        ("spqr:fraction=0.9", "int2-g32", "at most 0.5"),
        ("lorc:rank=0", "int2-g32", "1 to 48"),
        ("lorc:rank=49", "int2-g32", "1 to 48"),
        ("lorc:objective=mse", "int2-g32", "weights, diagonal, hessian"),
        ("lorc:rounds=0", "int2-g32", "1 or more"),
        ("lossless", "int4-g64", "take df11"),
        ("lossless", "bf16", "take df11"),
    ],
)
def test_bad_requests(method, format, message, case):
    with pytest.raises(FormatError, match=message):
        parse_method(method)(case[0], parse_format(format), case[1])


def test_an_unknown_base_is_refused(case):
    with pytest.raises(RequestError, match="'nothing' is unknown"):
        parse_method("lorc:base=nothing")(case[0], INT2, case[1])
