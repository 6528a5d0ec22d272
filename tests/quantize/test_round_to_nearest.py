"""Round-to-nearest in NumPy and natively: the same bits, no worse than min-max, near the best there is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats import FORMATS, Format, parse_format
from lowbit.quantize import quantize_array, round_to_nearest
from lowbit.quantize.native import quantize_native
from lowbit.quantize.round_to_nearest import quantize_reference, quantize_with_error

TABLE_NAMES = [name for name, f in FORMATS.items() if f.float_type is None]
MORE_NAMES = ["int4-row", "int8a-row", "int4-g32-e4m3", "int4a-g32-e8m0", "int3a-g64-e4m3", "int3-g96-fp32"]
MORE_NAMES += ["int4-g48-m4", "shift3-g16-m4", "ternary-g16-m4", "int1-g32-m4", "bfp4-g64-m4", "int4-g128-m4"]
MORE_NAMES += [
    "bcq2-g16",
    "bcq5-row",
    "trit2-g16-fp32",
    "trit3-g48",
    "trit2-row",
    "bcq8-g64",
    "trit2-g64-e8m0",
]
MORE_NAMES += ["e4m3fn-row", "nf4-row", "int1a-g64", "bitmod3-g64-e8m0", "e5m2-g32-fp32"]
CODEBOOKS = [
    Format.codebook([0.5, -3, 7, 1e-3, 0, 9], 32),
    Format.codebook([float(v) for v in np.sort(np.random.default_rng(5).standard_normal(200))], 64),
    Format.codebook([0.0, 1.0, 2.0, 5.0], 32),
]
SINGLE = [parse_format(name) for name in TABLE_NAMES + MORE_NAMES] + CODEBOOKS


def relative_error(matrix, weight):
    wide = weight.astype(np.float64)
    return np.square(matrix.dequantize() - wide).sum() / np.square(wide).sum()


def counted_error(matrix, weight, group_size):
    """Squared error per group, float64, in which a weight counts 3/4 + 1/4 w^2 / mean(w^2)."""
    wide = weight.astype(np.float64).reshape(len(weight), -1, group_size)
    squares = np.square(wide)
    importance = 0.75 + 0.25 * squares / squares.mean(axis=2, keepdims=True)
    rest = matrix.dequantize().astype(np.float64).reshape(wide.shape) - wide
    return (importance * np.square(rest)).sum(axis=2)


def awkward(rng):
    """Zero rows and groups, one sign only, tiny rows, outliers, numbers that tie."""
    w = (rng.standard_normal((37, 384)) * 0.05).astype(np.float32)
    w[3] = 0
    w[7, :128] = 0
    w[8] = np.abs(w[8])
    w[9] = -np.abs(w[9])
    w[10] *= 1e-12
    w[11, 5] = 40.0
    w[12] = np.round(w[12] * 80) / 16
    w[13] = 0.25
    return w


@pytest.mark.parametrize("format", [f for f in SINGLE if f.name != "dual-g64"], ids=lambda f: f.name)
@pytest.mark.parametrize("search", ["mse", "minmax", "mse by counts", "plain by counts"])
def test_native_equals_numpy_bit_for_bit(format, search, rng):
    for w in (awkward(rng), awkward(rng)[:5] * np.float32(1e-7)):
        largest = float(np.abs(w).max())
        kind, _, counted = search.partition(" by ")
        counts = np.exp(3 * rng.standard_normal(w.shape[1])).astype(np.float32) if counted else None
        native, native_error = quantize_native(w, format, kind, largest, counts)
        numpy, numpy_error = quantize_reference(w, format, kind, largest, counts)
        if counts is not None and format.scale_type == "fp16" and 1 < format.bits < 8 and len(w) > 5:
            plain, _ = quantize_native(w, format, kind, largest)
            assert (plain.dequantize() != native.dequantize()).any()
        assert native_error == pytest.approx(numpy_error, rel=1e-5)
        assert native_error == pytest.approx(relative_error(native, w), rel=1e-4, abs=1e-12)
        for term, other in zip(native.terms, numpy.terms, strict=True):
            for (name, a), (_, b) in zip(term.arrays(), other.arrays(), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=name)
            assert term.meta() == other.meta()


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.float_type is None])
def test_least_squares_is_never_worse_than_min_max(name, rng):
    w = rng.standard_t(4, (24, 256)).astype(np.float32)
    group = FORMATS[name].group_size or 256
    mse, minmax = (
        counted_error(round_to_nearest(w, FORMATS[name], search), w, group) for search in ("mse", "minmax")
    )
    if FORMATS[name].scale_type == "m4":  # groups share a scale, so a row is what gets better
        mse, minmax = mse.sum(axis=1), minmax.sum(axis=1)
    assert (mse <= minmax * (1 + 1e-5) + 1e-12).all()


# Against brute force over 300 scales of both signs, without refit; 0.5% over it is allowed.
@pytest.mark.parametrize("name", ["int2-g64", "int3-g64", "int4-g32", "int4-g128", "int5-g64", "int4-row"])
def test_the_search_finds_nearly_the_best_scale(name, rng):
    format = parse_format(name)
    w = rng.standard_normal((64, 256)).astype(np.float32)
    groups = w.reshape(-1, format.group_size or 256)
    importance = 0.75 + 0.25 * groups**2 / np.square(groups).mean(1, keepdims=True)
    low, high = format.tables[0][0], format.tables[0][-1]
    best = np.full(len(groups), np.inf)
    for ratio in np.geomspace(0.2, 1.4, 300):
        for sign in (1, -1):
            cover = np.maximum((sign * groups).max(1) / high, (sign * groups).min(1) / low)
            scale = (sign * ratio * cover)[:, None]
            rest = groups - scale * np.clip(np.rint(groups / scale), low, high)
            best = np.minimum(best, (importance * rest**2).sum(1))
    found = counted_error(round_to_nearest(w, format), w, groups.shape[1])
    assert found.sum() <= best.sum() * 1.005


@pytest.mark.parametrize("name", ["int4-g16-m4", "int3-g32-m4"])
def test_multipliers_are_nearly_the_best_there_are(name, rng):
    """Against 400 scales of both signs for each super-group, with all 15 multipliers for each group."""
    format = parse_format(name)
    w = rng.standard_normal((12, 256)).astype(np.float32)
    groups = w.reshape(12, -1, format.group_size)
    importance = 0.75 + 0.25 * groups**2 / np.square(groups).mean(2, keepdims=True)
    low, high = format.tables[0][0], format.tables[0][-1]
    best = np.full(12, np.inf)
    for scale in np.geomspace(0.3, 1.5, 200) * np.abs(w).max() / high / 15:
        for sign in (1, -1):
            unit = sign * scale * np.arange(1, 16)[:, None, None, None]
            rest = groups - unit * np.clip(np.rint(groups / unit), low, high)
            best = np.minimum(best, (importance * rest**2).sum(3).min(0).sum(1))
    found = counted_error(round_to_nearest(w, format), w, format.group_size).sum(axis=1)
    assert found.sum() <= best.sum() * 1.01


def test_small_groups_with_multipliers_beat_larger_ones_with_scales(rng):
    """Fewer bits and less error: 4.31 against 4.5 bits, 4.19 against 4.25."""
    w = rng.standard_t(5, (64, 512)).astype(np.float32)
    for small, large in (("int4-g16-m4", "int4-g32"), ("int4-g32-m4", "int4-g64")):
        one, other = parse_format(small), parse_format(large)
        assert one.bits_per_weight(512) < other.bits_per_weight(512)
        assert quantize_with_error(w, one)[1] < 0.95 * quantize_with_error(w, other)[1]


# Lloyd-Max levels with no scale to store would reach 0.1175, 0.03454, 0.009497 on a normal distribution
# (J. Max 1960, table I); short groups do better, since each takes its own scale.
@pytest.mark.parametrize("name, limit", [("int2-g32", 0.1185), ("int3-g32", 0.0280), ("int4-g32", 0.0068)])
def test_errors_on_normal_weights(name, limit, rng):
    w = rng.standard_normal((256, 512)).astype(np.float32)
    assert quantize_with_error(w, parse_format(name))[1] < limit


@pytest.mark.parametrize(
    "name", ["int4-g32", "int4a-g32", "int2b-g64", "nf4-g64", "e4m3fn-g64", "mxfp4", "ternary"]
)
def test_weights_of_the_format_come_back(name, rng):
    """Weights that lie on levels times a scale are reproduced exactly."""
    format = parse_format(name)
    codes = rng.integers(0, len(format.tables[0]), (32, 256))
    codes[:, ::16] = int(np.argmax(format.tables[0]))
    levels = np.array(format.tables[0], np.float32)
    w = levels[codes] * np.float32(0.25)
    if format.zero_point:
        w -= np.float32(0.25 * 5)
    np.testing.assert_array_equal(round_to_nearest(w, format).dequantize(), w)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("largest", [1e-30, 1.0, 1e30])
def test_any_magnitude(bits, largest, rng):
    w = rng.uniform(-1, 1, (16, 64)).astype(np.float32)
    plain = quantize_with_error(w, Format.integer(bits, 32))[1]
    scaled = quantize_with_error(w * np.float32(largest), Format.integer(bits, 32))[1]
    assert scaled == pytest.approx(plain, rel=0.02, abs=1e-7)


def test_a_larger_negative_side_uses_minus_eight(rng):
    w = rng.uniform(-1, 0.85, (16, 32)).astype(np.float32)
    w[:, 0] = -1.0
    mirrored = round_to_nearest(-w, Format.integer(4, 32)).dequantize()
    np.testing.assert_array_equal(mirrored, -round_to_nearest(w, Format.integer(4, 32)).dequantize())


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_plain_floats(name, rng):
    w = rng.standard_normal((5, 48)).astype(np.float32)
    w[0, :4] = [1 + 2**-9, 1 + 2**-8 + 2**-9, -(1 + 2**-9), 3e38 if name != "fp16" else 65504]
    decoded = round_to_nearest(w, FORMATS[name]).dequantize()
    if name == "bf16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        np.testing.assert_array_equal(decoded, w.astype(ml_dtypes.bfloat16).astype(np.float32))
    else:
        np.testing.assert_array_equal(decoded, w.astype({"fp32": np.float32, "fp16": np.float16}[name]))


def test_fp16_overflow_is_refused():
    with pytest.raises(FormatError, match="70000 rounds above 65504; use bf16 or fp32"):
        round_to_nearest(np.full((1, 16), 70000, np.float32), FORMATS["fp16"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["int4-g32", "bcq2-g32", "fp16"])
def test_weights_that_are_not_finite_are_named(bad, name, rng):
    w = rng.standard_normal((40, 64)).astype(np.float32)
    w[33, 50] = bad
    with pytest.raises(FormatError, match=rf"quantize: weight\[33, 50\] is {bad}"):
        round_to_nearest(w, parse_format(name))


def test_arguments_are_checked(rng):
    w = rng.standard_normal((4, 100)).astype(np.float32)
    with pytest.raises(FormatError, match="in_features=100 is not a multiple of group_size=32; use -row"):
        quantize_array(w, "int4-g32")
    with pytest.raises(FormatError, match="search='best'; use one of mse, minmax"):
        round_to_nearest(w, parse_format("int4-row"), "best")
    with pytest.raises(FormatError, match=r"\[100\]"):
        quantize_array(w[0], "int4-row")
    with pytest.raises(FormatError, match="complex"):
        quantize_array(w.astype(complex), "int4-row")
    with pytest.raises(FormatError, match=r"\[0, 64\]"):
        quantize_array(np.zeros((0, 64), np.float32), "int4-g32")


def test_arrays_of_any_layout_and_type(rng):
    w = rng.standard_normal((64, 40)).astype(np.float32)
    expected = quantize_array(np.ascontiguousarray(w.T), "int4-g32").dequantize()
    np.testing.assert_array_equal(quantize_array(w.T, "int4-g32").dequantize(), expected)
    np.testing.assert_array_equal(quantize_array(w.T.astype(np.float64), "int4-g32").dequantize(), expected)
    assert quantize_array(np.arange(64).reshape(2, 32), "int8-g32").shape == (2, 32)


@given(
    seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 40), groups=st.integers(1, 5), bits=st.integers(1, 8)
)
@settings(max_examples=40, deadline=None)
def test_rows_do_not_depend_on_each_other(seed, rows, groups, bits):
    w = np.random.default_rng(seed).standard_normal((rows, 16 * groups)).astype(np.float32)
    format = Format.integer(bits, 16)
    together = round_to_nearest(w, format).dequantize()
    row = seed % rows
    np.testing.assert_array_equal(round_to_nearest(w[row : row + 1], format).dequantize()[0], together[row])


def test_widths_that_are_no_multiple_of_anything(rng):
    for columns in (1, 3, 17, 31, 33, 95):
        w = rng.standard_normal((18, columns)).astype(np.float32)
        for name in ("int8-row", "nf4-row", "int4a-row"):
            format = parse_format(name)
            native, _ = quantize_native(w, format, "mse", float(np.abs(w).max()))
            numpy, _ = quantize_reference(w, format, "mse", float(np.abs(w).max()))
            np.testing.assert_array_equal(native.terms[0].codes, numpy.terms[0].codes)
            np.testing.assert_array_equal(native.dequantize(), numpy.dequantize())


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avxvnni"])
def test_every_instruction_set_gives_the_same_bits(isa, tmp_path, rng):
    """The instruction set is chosen once per process, so others run in a process of their own."""
    import os
    import subprocess
    import sys

    _native = pytest.importorskip("lowbit._native")
    if isa not in _native.supported_isas():
        pytest.skip(f"this CPU has no {isa}")
    w = awkward(rng)
    np.save(tmp_path / "w.npy", w)
    names = ["int4-g32", "int3a-g64", "nf4-g64", "e4m3fn-g64", "nvfp4", "mxfp4", "bitmod3-g64"]
    names += ["int4-g16-m4", "int2b-g32-m4", "ternary", "bcq3-g128", "trit2-g128"]
    script = (
        "import sys, numpy as np\n"
        "from lowbit.quantize import quantize_array\n"
        "w = np.load(sys.argv[1] + '/w.npy')\n"
        "for name in sys.argv[2:]:\n"
        "    np.savez(f'{sys.argv[1]}/{name}.npz', **quantize_array(w, name).state()[1])\n"
    )
    environment = os.environ | {"LOWBIT_ISA": isa}
    subprocess.run([sys.executable, "-c", script, str(tmp_path), *names], check=True, env=environment)
    for name in names:
        stored = np.load(tmp_path / f"{name}.npz")
        for entry, array in quantize_array(w, name).state()[1].items():
            np.testing.assert_array_equal(stored[entry], array, err_msg=f"{name} {entry}")
