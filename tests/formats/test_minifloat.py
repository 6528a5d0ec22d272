"""Minifloats against ml_dtypes, NumPy's own floats and exact arithmetic."""

import ml_dtypes
import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats.minifloat import E8M0, FLOAT_TYPES, Minifloat, minifloat, parse_minifloat
from lowbit.formats.rounding import ROUNDINGS

from .brute import round_over_grid, same, unbounded_grid

# Our name -> the type of ml_dtypes with the same codes.
PEERS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3": ml_dtypes.float8_e4m3,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
FINITE = ("e2m1", "e3m2", "e2m3")


def peer_codes(x: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return x.astype(PEERS[name]).view(np.uint8)


def named(name: str) -> Minifloat:
    element = parse_minifloat(name)
    assert element is not None
    return element


@pytest.mark.parametrize("name", PEERS)
def test_every_code_has_the_value_of_ml_dtypes(name):
    element = named(name)
    codes = np.arange(2**element.bits, dtype=np.uint8)
    assert same(element.decode(codes), codes.view(PEERS[name]).astype(np.float64))


def test_the_comparison_of_codes_notices_one_wrong_value():
    values = named("e4m3fn").values()
    for code, wrong in ((0, -0.0), (1, 0.0), (127, 480.0), (126, 447.0)):
        changed = values.copy()
        changed[code] = wrong
        assert not same(changed, values)
    assert not same(minifloat(4, 3, 8, "fn").values(), values)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_every_code_of_16_bits(name):
    peer = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[name]
    codes = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        want = codes.view(peer).astype(np.float64)
    assert same(FLOAT_TYPES[name].decode(codes), want)


@pytest.mark.parametrize("name", PEERS)
def test_encoding_gives_each_code_back(name):
    element = named(name)
    values = element.values()
    keep = ~np.isnan(values)
    assert (element.encode(values[keep]) == np.flatnonzero(keep)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", PEERS)
def test_all_float16_values_encode_as_in_ml_dtypes(name, dtype):
    with np.errstate(invalid="ignore"):
        x = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(dtype)
    element = named(name)
    if name in FINITE:  # ml_dtypes turns NaN into a zero there, we refuse
        with pytest.raises(FormatError, match="NaN"):
            element.encode(x)
        x = x[~np.isnan(x)]
    assert (element.encode(x) == peer_codes(x, name)).all()


@pytest.mark.parametrize("name", PEERS)
def test_ties_and_their_neighbours_encode_as_in_ml_dtypes(name):
    element = named(name)
    levels = np.unique(element.values()[np.isfinite(element.values())])
    top = levels[-1] + (levels[-1] - levels[-2])  # the level that would follow the largest
    if element.signed:
        levels = np.concatenate([[-top], levels, [top]])
    else:
        levels = levels[1:]  # 2**-127 and its midpoint are subnormal in float32; see the next test
    ties = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    assert (ties.astype(np.float64) * 2 == levels[1:] + levels[:-1]).all()
    x = np.concatenate(
        [ties, np.nextafter(ties, np.float32(-np.inf)), np.nextafter(ties, np.float32(np.inf))]
    )
    for dtype in (np.float32, np.float64):
        assert (element.encode(x.astype(dtype)) == peer_codes(x.astype(dtype), name)).all()


def test_e8m0_near_its_smallest_value():
    # ml_dtypes rounds float32 subnormals up here (1.02 * 2**-127 becomes 2**-126); nearest is meant.
    x = np.ldexp([1.0, 1.02, 1.49, 1.5, 1.51, 2.0, 0.5, 1e-3], -127)
    assert E8M0.encode(x).tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert np.isnan(E8M0.round(np.array([0.0, -0.0, -1.0, np.inf, -np.inf, np.nan, 2.0**127 * 1.5]))).all()
    assert E8M0.round(2.0**127 * 1.49) == 2.0**127


@pytest.mark.parametrize("name", PEERS)
def test_special_inputs_encode_as_in_ml_dtypes(name):
    x = np.array([0.0, -0.0, np.inf, -np.inf, 1e30, -1e30, 1e-45, -1e-45, np.nan, -np.nan], np.float32)
    if name == "e8m0":
        x = x[x != np.float32(1e-45)]
    element = named(name)
    if name in FINITE:
        x = x[:-2]
    assert (element.encode(x) == peer_codes(x, name)).all()


def test_overflow_is_what_each_kind_says():
    x = np.array([1e9, -1e9, np.inf, -np.inf])
    inf, nan = np.inf, np.nan
    assert same(named("e5m2").round(x), [inf, -inf, inf, -inf])
    assert same(named("e4m3fn").round(x), [nan] * 4)
    assert same(named("e4m3fnuz").round(x), [nan] * 4)
    assert same(named("e2m1").round(x), [6, -6, 6, -6])
    assert same(named("e4m3fn").round(x, saturate=True), [448, -448, 448, -448])
    assert same(named("e5m2").round(x, saturate=True), [57344, -57344, 57344, -57344])
    # Directed rounding of a finite number stops at the largest value on the inner side.
    assert same(named("e5m2").round(x, "toward_zero"), [57344, -57344, inf, -inf])
    assert same(named("e5m2").round(x, "up"), [inf, -57344, inf, -inf])
    assert same(named("e5m2").round(x, "down"), [57344, -inf, inf, -inf])
    assert same(named("e4m3fn").round(x, "down"), [448, nan, nan, nan])


# Exponent bits, mantissa bits, bias, specials: the named ones and some that nobody has named.
SHAPES = [
    (2, 1, 1, "finite"),
    (3, 2, 3, "finite"),
    (3, 2, 3, "ieee"),
    (2, 3, 1, "finite"),
    (4, 3, 7, "fn"),
    (4, 3, 8, "fnuz"),
    (5, 2, 15, "ieee"),
    (3, 0, 3, "finite"),
    (1, 2, 0, "finite"),
    (1, 5, 5, "fn"),
    (2, 2, -3, "ieee"),
    (4, 1, 20, "fnuz"),
    (2, 5, 1, "ieee"),
]


@pytest.mark.parametrize("rounding", [r for r in ROUNDINGS if r != "stochastic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_equals_exact_arithmetic(shape, rounding):
    e, m, bias, specials = shape
    element = Minifloat(e, m, bias, specials)
    top = 2**e - bias + 1
    grid = unbounded_grid(e, m, bias, top)
    values = np.array(grid)
    middle = (values[1:] + values[:-1]) / 2
    rng = np.random.default_rng(5)
    x = np.concatenate([values[1:-1], middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)])
    x = np.concatenate(
        [x, rng.uniform(-1, 1, 100) * values[-1], rng.normal(size=100) * element.smallest_normal]
    )
    if m == 0:  # the significand of a tie between powers of two is 1.5, which rounds to the even 2
        x = np.setdiff1d(x, middle[np.abs(middle) > element.smallest_normal])
    result = element.round(x, rounding)
    for number, got in zip(x, result):
        want = round_over_grid(number, grid, rounding)
        if abs(want) > element.max:
            inward = rounding == "toward_zero" or rounding == ("up" if number < 0 else "down")
            if specials == "finite" or inward:
                want = np.copysign(element.max, number)
            else:
                want = np.copysign(np.inf, number) if specials == "ieee" else np.nan
        assert got == want or (np.isnan(got) and np.isnan(want)), (number, got, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_limits_are_consistent(shape):
    element = Minifloat(*shape)
    values = element.values()
    finite = values[np.isfinite(values)]
    assert finite.max() == element.max
    assert finite[finite > 0].min() == min(element.smallest_subnormal, element.smallest_normal)
    keep = ~np.isnan(values)
    assert (element.encode(values[keep]) == np.flatnonzero(keep)).all()
    assert parse_minifloat(element.name) == element
    levels = np.array(element.levels())
    assert np.isfinite(levels).all() and not np.signbit(levels[levels == 0]).any()
    assert set(levels) == set(finite + 0.0)
    assert (levels[~np.isfinite(values)] == 0).all()
    assert (levels[np.isfinite(values)] == finite).all()


def test_float64_is_rounded_once():
    # Just above a tie of fp16; by way of float32 it would become the tie and round down to even.
    x = 1.0 + 2.0**-11 + 2.0**-40
    assert FLOAT_TYPES["fp16"].round(np.array(x)) == 1.0 + 2.0**-10
    assert np.float16(np.float32(x)) == 1.0


def test_plain_floats_round_as_numpy_casts(rng):
    with np.errstate(over="ignore"):
        x = rng.normal(size=20000) * np.exp2(rng.integers(-160, 140, 20000))
        assert same(FLOAT_TYPES["fp32"].round(x), x.astype(np.float32))
        x = rng.normal(size=20000) * np.exp2(rng.integers(-30, 20, 20000))
        assert same(FLOAT_TYPES["fp16"].round(x), x.astype(np.float16))
        x = x.astype(np.float32)
        assert same(FLOAT_TYPES["bf16"].round(x), x.astype(ml_dtypes.bfloat16))
        codes = FLOAT_TYPES["bf16"].encode(x)
        assert codes.dtype == np.uint16 and (codes == x.astype(ml_dtypes.bfloat16).view(np.uint16)).all()
    wide = Minifloat(11, 52, 1023, "ieee")
    x = np.array([1.1, -5e-324, 1.7976931348623157e308, -0.0, np.inf, 2.2250738585072014e-308])
    assert same(wide.round(x), x) and (wide.encode(x) == x.view(np.uint64)).all()


def test_zero_dimensional_and_empty_arrays():
    element = named("e3m2")
    assert element.round(np.array(1.3)).shape == () and element.round(1.3) == 1.25
    assert element.encode(np.zeros((0, 3))).shape == (0, 3)
    assert element.decode(np.zeros((2, 0), np.uint8)).shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0, 3), "exponent_bits"),
        ((12, 3), "exponent_bits"),
        ((4, 53), "mantissa_bits"),
        ((1, 1, None, "ieee"), "ieee"),
        ((4, 3, None, "inf"), "specials"),
        ((3, 2, None, "fn"), "no code on NaN"),
        ((1, 0, None, "finite"), "3 bits"),
        ((4, 3, 1200), "bias"),
        ((4, 3, -1200), "bias"),
    ],
)
def test_impossible_minifloats_are_refused(arguments, word):
    with pytest.raises(FormatError, match=word):
        minifloat(*arguments)


def test_names():
    assert named("e2m1fn") == named("e2m1") and named("e4m3fn").name == "e4m3fn"
    assert named("e3m2").specials == "finite" and named("e3m2ieee").max == 14.0
    assert named("e4m3").specials == "ieee" and named("e4m3").max == 240.0
    assert named("e2m1b5").bias == 5 and named("e2m1b-1").bias == -1
    assert named("e8m0") is E8M0 and named("e8m0").name == "e8m0"
    assert named("fp16") == named("e5m10") and named("bf16") == named("e8m7")
    assert parse_minifloat("int4") is None and parse_minifloat("e4m") is None


def test_codes_out_of_range_are_refused():
    for codes in (np.array([16]), np.array([-1]), np.array([1.0])):
        with pytest.raises(FormatError, match="0 to 15"):
            named("e2m1").decode(codes)
