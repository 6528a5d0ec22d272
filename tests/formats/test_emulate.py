"""emulate against Pychop, ml_dtypes and slow definitions."""

import math
import warnings

import ml_dtypes
import numpy as np
import pytest

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import FORMATS, Format, emulate, parse_format
from lowbit.formats.minifloat import minifloat, parse_minifloat
from lowbit.formats.rounding import ROUNDINGS

from .brute import same

# Pychop's mode numbers.
PYCHOP_MODES = {"nearest_even": 1, "up": 2, "down": 3, "toward_zero": 4, "nearest_away": 8}
SINGLE_TERM = [n for n, f in FORMATS.items() if f.terms == 1 and f.float_type is None]


@pytest.fixture(scope="module")
def pychop():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("pychop")


@pytest.mark.parametrize("rounding", PYCHOP_MODES)
@pytest.mark.parametrize(
    ("name", "exponent_bits", "mantissa_bits"),
    [
        ("e3m2", 3, 2),
        ("e2m3", 2, 3),
        ("e4m3", 4, 3),
        ("e5m2", 5, 2),
        ("e3m4", 3, 4),
        ("fp16", 5, 10),
        ("bf16", 8, 7),
        ("e8m10", 8, 10),
        ("e6m9", 6, 9),
        ("fp32", 8, 23),
    ],
)
def test_plain_rounding_equals_pychop(pychop, name, exponent_bits, mantissa_bits, rounding):
    """In the range of the IEEE-like format that Pychop emulates; in the binade above it Pychop gives 0.

    Its ties away from zero go toward zero for negative numbers, so that mode is compared on positive numbers.
    """
    element = minifloat(exponent_bits, mantissa_bits, specials="ieee")
    rng = np.random.default_rng(1)
    low = max(element.smallest_exponent - mantissa_bits - 2, -120)
    x = rng.normal(size=3000) * np.exp2(rng.uniform(low, element.largest_exponent, 3000))
    if element.bits <= 8:
        values = element.values()
        values = np.unique(values[np.isfinite(values)])
        x = np.concatenate([x, values, (values[1:] + values[:-1]) / 2])
    x = x[np.abs(x) <= element.max]
    if rounding == "nearest_away":
        x = np.abs(x)
    with np.errstate(all="ignore"):
        want = np.concatenate(
            [
                pychop.Chop(exponent_bits, mantissa_bits, rmode=PYCHOP_MODES[rounding])(part)
                for part in np.split(x, range(700, len(x), 700))
            ]
        )
    assert np.array_equal(emulate(x, name, rounding), want)
    mirror = {"up": "down", "down": "up"}.get(rounding, rounding)
    assert np.array_equal(-emulate(-x, name, mirror), want)
    assert len(x) > 1000 and (want != x).any()


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8"])
def test_mx_equals_pychop(pychop, name):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(6, 64)) * np.exp2(rng.integers(-20, 20, (6, 1)))
    x[3, :32] = 0
    peer = {"mxfp4": "mxfp4_e2m1"}.get(name, name)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        want = np.asarray(pychop.mx_quantize(x, format=peer, block_size=32)).reshape(x.shape)
    assert np.array_equal(emulate(x, name), want)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("e4m3fn", ml_dtypes.float8_e4m3fn),
        ("e5m2", ml_dtypes.float8_e5m2),
        ("e2m1", ml_dtypes.float4_e2m1fn),
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("e4m3fnuz", ml_dtypes.float8_e4m3fnuz),
    ],
)
def test_plain_rounding_equals_casts_of_ml_dtypes(name, peer, dtype, rng):
    x = np.concatenate(
        [rng.normal(size=2000) * np.exp2(rng.integers(-18, 14, 2000)), [0.0, -0.0, np.inf, -np.inf]]
    )
    x = x.astype(dtype)
    with np.errstate(all="ignore"):
        want = x.astype(peer).astype(dtype)
    got = emulate(x, name)
    assert got.dtype == dtype and same(got, want)


def test_float64_is_rounded_once():
    x = np.array([1 + 2.0**-11 + 2.0**-40, -1 - 2.0**-11 - 2.0**-50])
    assert emulate(x, "fp16").tolist() == [1 + 2.0**-10, -1 - 2.0**-10]
    tie = np.array([1.25 + 2.0**-30]) + 0.0  # between 1 and 1.5 of e2m1, just above the middle
    assert emulate(tie, "e2m1") == 1.5 and emulate(tie.astype(np.float32), "e2m1") == 1.0


def test_plain_integers_and_tables():
    x = [1.5, 2.5, -2.5, -0.3, 99, -99, np.inf]
    assert emulate(x, "int4").tolist() == [2, 2, -2, 0, 7, -8, 7]
    assert not np.signbit(emulate(x, "int4")[3])
    assert emulate(x, "int4", "nearest_away").tolist() == [2, 3, -3, 0, 7, -8, 7]
    assert emulate(x, "int8", "up").tolist() == [2, 3, -2, 0, 99, -99, 127]
    assert emulate(x, "ternary").tolist() == [1, 1, -1, 0, 1, -1, 1]
    assert emulate([0.2, 1.9, -5], "int2b").tolist() == [1, 1, -3]
    assert emulate([0.04, -0.9], "nf4").tolist() == [0.07958029955625534, -1.0]
    assert emulate([0.9, 3.1, -200], "shift4").tolist() == [1, 4, -128]
    assert emulate(np.array([4, 300]), "int4").dtype == np.float64
    assert emulate(3, "int2").tolist() == 1 and emulate(np.float32(0.3), "e2m1").dtype == np.float32
    with pytest.raises(FormatError, match="NaN"):
        emulate([np.nan], "int4")
    assert np.isnan(emulate([np.nan], "e2m1")).all()


def slow_groups(x: np.ndarray, fmt: Format, size: int) -> np.ndarray:
    """Nearest-level rounding, number by number, with scales chosen by the documented rule."""
    out = np.empty_like(x)
    for row in range(len(x)):
        for start in range(0, x.shape[1], size):
            group = x[row, start : start + size]
            best = None
            for table in fmt.tables:
                if set(table) in ({-1.0, 1.0}, {-1.0, 0.0, 1.0}):
                    scale = float(np.mean(np.abs(group)))
                else:
                    ends = [group.max() / max(table)] + ([group.min() / min(table)] if min(table) < 0 else [])
                    scale = max(0.0, *ends)
                scale = float(np.float16(scale)) if fmt.scale_type == "fp16" else float(np.float32(scale))
                levels = [scale * v for v in table]
                rounded = [min(levels, key=lambda v: abs(v - number)) for number in group]
                error = sum((a - b) ** 2 for a, b in zip(rounded, group))
                if best is None or error < best[0]:
                    best = (error, rounded)
            out[row, start : start + size] = best[1]
    return out


@pytest.mark.parametrize(
    "name",
    [
        "int4-g64",
        "int1-g64",
        "int3b-g64",
        "ternary-g64",
        "nf4-g64",
        "e2m1-g64",
        "e5m2-g64",
        "shift3-g64",
        "bitmod3-g128",
        "bitmod4-g128",
    ],
)
@pytest.mark.parametrize("size", [5, 16, 37])
def test_groups_against_a_slow_definition(name, size, rng):
    x = rng.normal(size=(3, 37))
    if size == 5:
        x[0, :5] = 0
    fmt = parse_format(name)
    got, want = emulate(x, fmt, group_size=size), slow_groups(x, fmt, size)
    # Division by the scale and multiplication of the levels round differently by an ulp near the middle.
    assert np.allclose(got, want, rtol=1e-14, atol=0)
    assert not np.allclose(np.zeros_like(x), want)


def test_asymmetric_groups(rng):
    x = rng.normal(size=(4, 64)) + 3
    x[1] -= 9
    got = emulate(x, "int4a-g16-fp32")
    groups, result = x.reshape(4, 4, 16), got.reshape(4, 4, 16)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scale = (high - low) / 15
    assert (np.abs(result - groups) <= scale[..., None] * (0.5 + 0.5 + 1e-6)).all()
    steps = result / scale[..., None]
    assert np.abs(steps - np.rint(steps)).max() < 1e-4
    assert (emulate(np.zeros((2, 32)), "int4a-g16") == 0).all()


def test_nvfp4_has_two_levels_of_scales(rng):
    x = rng.normal(size=(4, 64)) * 1e-6
    error = np.abs(emulate(x, "nvfp4") - x).reshape(4, 4, 16).max(-1)
    assert (error <= np.abs(x).reshape(4, 4, 16).max(-1) * (1 / 6 + 0.07)).all()
    scales = np.unique(np.abs(emulate(np.repeat(np.array([[448.0, 1.0, 3.0]]) * 6, 16, axis=1), "nvfp4")))
    assert scales.tolist() == [6, 18, 2688]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", SINGLE_TERM)
def test_every_format_keeps_shape_dtype_and_its_own_values(name, rounding, rng):
    x = rng.normal(size=(2, 3, 40)).astype(np.float32)
    y = emulate(x, name, rounding, seed=1)
    assert y.shape == x.shape and y.dtype == np.float32 and np.isfinite(y).all()
    relative = float(np.linalg.norm(y - x) / np.linalg.norm(x))
    assert 0 < relative < 1.5
    distinct = len(np.unique(emulate(x[0, 0], name, rounding, group_size=0, seed=1)))
    assert distinct <= 2 ** parse_format(name).bits


@pytest.mark.parametrize("name", ["int4-g64", "e2m1-g64", "nf4-g64", "mxfp4", "int8-g64"])
def test_emulating_twice_changes_nothing(name, rng):
    once = emulate(rng.normal(size=(4, 64)), name)
    assert np.allclose(emulate(once, name), once, rtol=2e-3, atol=0)


def test_multipliers_by_hand():
    """The largest group takes multiplier 15, the one at a fifth of it 3, one of zeros 0."""
    levels = np.arange(-8.0, 8.0)
    x = 0.25 * np.concatenate([15 * levels, 3 * levels, 0 * levels, 3 * levels])
    assert np.array_equal(emulate(x, "int4-g16-m4"), x)
    smaller = x.copy()
    smaller[16:32] *= 0.9  # 2.7 times the scale: multiplier 3 still covers it, 2 would not
    assert np.array_equal(emulate(smaller, "int4-g16-m4")[16:32] / 0.75, np.rint(2.7 / 3 * levels))
    with pytest.raises(FormatError, match="name it in the format"):
        emulate(x, "int4", group_size=16, scale_type="m4")


def test_more_bits_are_nearer(rng):
    x = rng.normal(size=(4, 128))
    errors = [np.square(emulate(x, f"int{bits}-g64") - x).sum() for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] / errors[-1] > 1000


def test_shapes():
    assert emulate(1.3, "e2m1").shape == () and emulate(1.3, "int4-g64").shape == ()
    assert emulate(np.zeros((0, 5)), "int4-g64").shape == (0, 5)
    assert emulate(np.zeros((3, 0)), "int4").shape == (3, 0)
    x = np.arange(24.0).reshape(2, 3, 4)
    assert np.array_equal(emulate(x, "int8", group_size=2)[1, 2], emulate(x[1, 2], "int8", group_size=2))
    assert np.array_equal(emulate(x.T, "e3m2"), emulate(x, "e3m2").T)
    before = x.copy()
    emulate(x, "int3-g64")
    assert np.array_equal(x, before)


def test_arguments_override_the_name(rng):
    x = rng.normal(size=(2, 64))
    assert np.array_equal(emulate(x, "e3m2", group_size=32), emulate(x, "e3m2-g32"))
    assert np.array_equal(emulate(x, "e3m2", group_size=32, scale_type="e8m0"), emulate(x, "mxfp6_e3m2"))
    assert np.array_equal(emulate(x, "mxfp4", scale_type="fp32", group_size=0), emulate(x, "e2m1-row-fp32"))
    assert np.array_equal(emulate(x, minifloat(3, 2)), emulate(x, "e3m2"))
    assert np.array_equal(emulate(x, "e3m2", scale_type="fp32"), emulate(x, "e3m2-g64-fp32"))
    assert np.array_equal(emulate(x, "fp4"), emulate(x, "e2m1"))
    assert not np.array_equal(emulate(x, "int4-g64"), emulate(x, "int4-g32"))


def test_stochastic_rounding_has_a_seed_and_no_bias():
    x = np.full((20000,), 0.3)
    assert np.array_equal(emulate(x, "e2m1", "stochastic", seed=3), emulate(x, "e2m1", "stochastic", seed=3))
    assert not np.array_equal(
        emulate(x, "e2m1", "stochastic", seed=3), emulate(x, "e2m1", "stochastic", seed=4)
    )
    assert not np.array_equal(emulate(x, "e2m1", "stochastic"), emulate(x, "e2m1", "stochastic"))
    for name in ("e2m1", "int2", "nf4"):
        y = emulate(x, name, "stochastic", seed=5)
        gap = np.ptp(y)
        assert gap > 0 and abs(y.mean() - 0.3) < 5 * gap / 2 / math.sqrt(len(x))
    x = np.linspace(-1, 1, 64)
    mean = np.mean(
        [emulate(x, "int3", "stochastic", group_size=64, scale_type="fp32", seed=s) for s in range(800)],
        axis=0,
    )
    assert np.abs(mean - x).max() < 5 * (1 / 3) / 2 / math.sqrt(800)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((np.zeros(2), "int99"), "bits"),
        ((np.zeros(2), "e3m22x"), "no such format"),
        ((np.zeros(2), "int4", "odd"), "nearest_even"),
        ((np.zeros(2), "int4", "up", -1), "group_size=-1"),
        ((np.zeros(2), "int4", "up", 4, "fp8"), "fp16, fp32"),
        ((np.zeros(2, complex), "int4"), "complex"),
        ((["a"], "int4"), "dtype"),
        (([1.0, np.inf], "int4-g64"), r"x\[1\]"),
        (([[1.0], [np.nan]], "mxfp4"), r"x\[1, 0\]"),
        ((np.zeros(2), "bf16", "up", 16), "no groups"),
        ((np.zeros(2), "e8m10-g16"), "at most 8"),
    ],
)
def test_errors(arguments, word):
    with pytest.raises(FormatError, match=word):
        emulate(*arguments)


def test_several_terms_are_fits():
    with pytest.raises(UnsupportedError, match="quantize"):
        emulate(np.zeros(4), "bcq3-g128")


def test_scale_overflow_names_the_remedy():
    with pytest.raises(FormatError, match="fp32"):
        emulate([1e9], "int4-g64")
    assert emulate([1e9], "int4-g64-fp32")[0] == pytest.approx(1e9, rel=1e-6)


def test_every_minifloat_name_of_the_docstring_is_known():
    for name in ("e3m2", "e8m10", "e4m3", "e8m0", "fp16", "bf16"):
        assert parse_minifloat(name) is not None
        assert emulate([2.0], name).tolist() == [2.0]
