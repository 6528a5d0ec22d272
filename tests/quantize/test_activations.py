"""Activation methods: what comes out is what their numbers can hold, and the bits are counted."""

import ml_dtypes
import numpy as np
import pytest

from lowbit.errors import FormatError, RequestError
from lowbit.quantize.activations import ACTIVATIONS, grouped


def inputs(tokens=64, width=256, loud=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    x[:, rng.choice(width, loud, replace=False)] *= 30
    return x


def prepared(name, sample=None, **options):
    method = ACTIVATIONS[name]
    if method.calibrated and sample is None:
        sample = inputs(seed=1)
    return method.prepare(sample, **options)


def error(name, x, sample=None, **options):
    return float(np.square(prepared(name, sample, **options)(x)[0] - x).mean())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rows_are_rounded_alone(name):
    x = inputs()
    round = prepared(name)
    before = x.copy()
    whole, bits = round(x)
    assert whole.dtype == np.float32 and whole.shape == x.shape
    np.testing.assert_array_equal(x, before)
    for row in (0, 17):
        one, again = round(x[row : row + 1])
        np.testing.assert_array_equal(one[0], whole[row])
        assert again == bits
    silent, _ = round(np.zeros((2, x.shape[1]), np.float32))
    np.testing.assert_array_equal(silent, 0)
    assert 0 < np.square(whole - x).sum() < 0.2 * np.square(x).sum()


@pytest.mark.parametrize("name", ["token", "group", "static", "integer", "llmfp4"])
def test_more_bits_err_less(name):
    x = inputs()
    errors = [error(name, x, bits=bits) for bits in (4, 6, 8)]
    assert errors[0] > errors[1] > errors[2] > 0


def test_integers_are_those_of_the_scale():
    x = inputs(4)
    rounded, bits = prepared("token", bits=4)(x)
    assert bits == 4 + 16 / 256
    for row, values in zip(rounded, x, strict=True):
        scale = np.float32(np.float16(np.abs(values).max() / np.float32(7)))
        np.testing.assert_array_equal(row, np.clip(np.rint(values / scale), -7, 7) * scale)
    _, bits = prepared("group", group=64)(x)
    assert bits == 8 + 16 / 64
    assert error("group", x, bits=4, group=16) < 0.5 * error("token", x, bits=4)
    with pytest.raises(FormatError, match="divide"):
        prepared("group", group=48)(x)
    assert grouped(x, 0, "here").shape == (4, 1, 256)


def test_static_ranges_come_from_the_sample():
    x = inputs()
    tensor, channel = (prepared("static", x, per=per, search="minmax") for per in ("tensor", "channel"))
    peaks = np.abs(x).max(0)
    for round, peak in ((tensor, peaks.max()), (channel, peaks)):
        rounded, bits = round(x * 100)  # everything beyond the range takes its end
        assert bits == 8
        assert (np.abs(rounded) <= peak * 1.0001).all()
    assert error("static", x, sample=x, bits=6) < error("static", x, sample=x, bits=6, search="minmax")
    assert error("static", x, sample=x, bits=6, per="channel") < 0.1 * error("static", x, sample=x, bits=6)


def test_integer_scale_is_a_product_and_a_shift():
    x = np.abs(inputs(loud=0))  # one-sided: the zero-point has to move
    rounded = prepared("integer", x)(x)[0]
    levels = np.unique(rounded)
    step = float(np.diff(levels).min())
    mantissa = np.frexp(step)[0] * 2**15
    assert mantissa == np.rint(mantissa) and 0.0 in levels
    np.testing.assert_array_equal(levels / step, np.rint(levels / step))
    assert error("integer", x, sample=x, bits=4) < 0.6 * error("static", x, sample=x, bits=4)


def test_fmpq_counts_blocks():
    sample, x = inputs(width=300, seed=1), inputs(width=300, seed=1)[:8]
    round = prepared("fmpq", sample)
    rounded, bits = round(x)
    assert bits == (128 * 8 + 172 * 4 + 3 * 16) / 300  # the outliers fill a part of one block
    assert np.square(rounded - x).sum() < 0.2 * np.square(prepared("token", bits=4)(x)[0] - x).sum()
    loud = np.abs(sample).max(0) > 4 * np.median(np.abs(sample).max(0))
    assert loud.sum() == 3
    relative = np.abs(rounded - x)[:, loud].max() / np.abs(x)[:, loud].max()
    assert relative < 0.5 / 126
    # Wherever the channels lie, the same numbers come out.
    order = np.random.default_rng(0).permutation(300)
    np.testing.assert_array_equal(prepared("fmpq", sample[:, order])(x[:, order])[0], rounded[:, order])
    quiet = prepared("fmpq", np.random.default_rng(0).standard_normal((64, 300)).astype(np.float32))
    assert quiet(x)[1] == 4 + 3 * 16 / 300


def test_e4m3_is_a_cast():
    x = inputs()
    scale = np.float16(np.abs(x).max(1, keepdims=True) / np.float32(448)).astype(np.float32)
    expected = (x / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_allclose(prepared("e4m3")(x)[0], expected, rtol=1e-6)


def test_llmfp4_searches_exponent_and_range():
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    long_tailed = (x**5).astype(np.float32)
    for sample in (x, long_tailed):
        rounded = prepared("llmfp4", sample)(sample)[0]
        positive = np.unique(rounded[rounded > 0])
        assert len(np.unique(rounded)) <= 15
        assert (
            np.square(rounded - sample).sum()
            < np.square(prepared("static", sample, bits=4)(sample)[0] - sample).sum()
        )
        # Even levels for even numbers, powers for those with tails.
        ratio = positive[-1] / positive[0]
        assert ratio <= 12 if sample is x else ratio > 12


def test_flexq_gives_more_bits_to_outliers():
    plain = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    assert prepared("flexq", plain)(plain)[1] == 6 + 16 / 128
    rough = plain * np.exp(2 * np.random.default_rng(1).standard_normal((64, 256))).astype(np.float32)
    assert prepared("flexq", rough)(rough)[1] == 8 + 16 / 128


@pytest.mark.parametrize(
    "name, options", [("token", {"bits": 1}), ("static", {"per": "row"}), ("llmfp4", {"bits": 2})]
)
def test_bad_options(name, options):
    with pytest.raises(RequestError):
        prepared(name, **options)
