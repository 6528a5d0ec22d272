"""Native products against the NumPy reference, on every instruction set, thread count and batch size."""

import hashlib
import json

import numpy as np
import pytest

from lowbit import _native
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format, emulate, parse_format
from lowbit.kernels import matmul
from lowbit.kernels.reference import integer_levels, matmul_reference, matmul_tolerance
from lowbit.packed import CodeTerm, FloatTerm, PackedMatrix, pack_base3, pack_codes
from lowbit.packed.layout import pack_groups, pack_multipliers, pack_values
from lowbit.quantize import round_to_nearest

SHAPES = [
    (64, 128, 32),
    (33, 64, 64),
    (40, 96, 0),
    (100, 160, 16),
    (31, 192, 96),
    (1, 100, 0),
    (65, 48, 48),
    (33, 48, 16),
]
BATCHES = [1, 2, 3, 7, 13, 100]


def code_matrix(rng, bits, kind, shape, scale_type="fp16"):
    """A random matrix of one code term; `kind` says how codes become numbers."""
    out_features, in_features, group_size = shape
    count, groups = 2**bits, in_features // group_size if group_size else 1
    codes = rng.integers(0, count, (out_features, in_features)).astype(np.uint8)
    extra, tables = {}, 1
    if kind == "symmetric":
        levels = np.arange(count) - count // 2 if bits > 1 else np.array([-1, 1])
    elif kind == "bipolar":
        levels = 2 * np.arange(count) - (count - 1)
    elif kind == "bytes":  # multiples of a quarter that fit one signed byte
        levels = rng.integers(-127, 128, count) * 0.25
        levels[0] = -31.75
    elif kind == "limbs":  # arbitrary reals
        levels = rng.normal(size=count)
    elif kind == "tables":
        tables = 4
        levels = rng.integers(-127, 128, (4, count))
        extra["selectors"] = pack_groups(rng.integers(0, 4, (out_features, groups)).astype(np.uint8))
    else:
        levels = np.arange(count)
        if kind == "zero_points":
            zeros = rng.integers(0, count, (out_features, groups)).astype(np.uint8)
            extra["zero_points"] = pack_groups(zeros)
        else:
            extra["offsets"] = pack_groups(rng.normal(size=(out_features, groups)).astype(np.float16))
    if scale_type == "e8m0":
        scales = rng.integers(120, 134, (out_features, groups)).astype(np.uint8)
    elif scale_type == "e4m3":
        scales = (
            rng.integers(0, 0x7F, (out_features, groups)) | rng.choice([0, 0x80], (out_features, groups))
        ).astype(np.uint8)
    else:
        scales = rng.uniform(0.5, 2, (out_features, groups)).astype(
            {"fp16": np.float16, "fp32": np.float32}[scale_type]
        )
    levels = np.asarray(levels, np.float32).reshape(tables, -1)
    term = CodeTerm(
        bits,
        levels,
        pack_codes(codes, bits),
        pack_groups(scales),
        scale_type,
        group_size,
        tensor_scale=0.5,
        **extra,
    )
    return PackedMatrix(out_features, in_features, (term,))


def m4_matrix(rng, bits, kind, shape):
    """Codes with a multiplier for each group and a scale for each super-group."""
    out_features, in_features, group_size, super_size = shape
    count = 2**bits
    levels = np.arange(count) - count // 2
    if kind == "table":
        levels = np.concatenate([[-8], rng.integers(-8, 9, count - 1)]) * 0.25
    multipliers = rng.integers(0, 16, (out_features, in_features // group_size)).astype(np.uint8)
    supers = in_features // super_size if super_size else 1
    term = CodeTerm(
        bits,
        levels.astype(np.float32)[None],
        pack_codes(rng.integers(0, count, shape[:2]).astype(np.uint8), bits),
        pack_groups(rng.uniform(-2, 2, (out_features, supers)).astype(np.float16)),
        "m4",
        group_size,
        tensor_scale=0.5,
        multipliers=pack_multipliers(multipliers),
        super_size=super_size,
    )
    return PackedMatrix(out_features, in_features, (term,))


def m8_matrix(rng, bits, shape, offsets, levels):
    """Scales, and offsets, that are a factor of each group times a number of its super-group."""
    out_features, in_features, group_size, super_size = shape
    groups, supers = in_features // group_size, in_features // super_size if super_size else 1
    levels = np.arange(1 << bits) - (1 << bits >> 1) if levels is None else levels

    def numbers():
        return pack_groups(rng.normal(size=(out_features, supers)).astype(np.float16))

    def factors():
        return pack_groups(rng.integers(-128, 128, (out_features, groups)).astype(np.int8))

    term = CodeTerm(
        bits,
        np.asarray(levels, np.float32)[None],
        pack_codes(rng.integers(0, len(levels), shape[:2]).astype(np.uint8), bits),
        numbers(),
        "m8",
        group_size,
        tensor_scale=0.5,
        super_size=super_size,
        factors=factors(),
        **({"offsets": numbers(), "offset_factors": factors()} if offsets else {}),
    )
    return PackedMatrix(out_features, in_features, (term,))


def base3_matrix(rng, levels, shape):
    out_features, in_features, group_size = shape
    groups = in_features // group_size if group_size else 1
    term = CodeTerm(
        2,
        np.float32([levels]),
        pack_base3(rng.integers(0, 3, shape[:2]).astype(np.uint8)),
        pack_groups(rng.uniform(-2, 2, (out_features, groups)).astype(np.float16)),
        "fp16",
        group_size,
        tensor_scale=0.5,
        packing="base3",
    )
    return PackedMatrix(out_features, in_features, (term,))


def float_matrix(rng, kind, shape):
    values = rng.normal(size=shape[:2]).astype(np.float32)
    if kind == "fp16":
        values = values.astype(np.float16)
    elif kind == "bf16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    return PackedMatrix(shape[0], shape[1], (FloatTerm(kind, pack_values(values)),))


def cases():
    """(name, matrix) for every width, map, scale type and odd shape."""
    rng = np.random.default_rng(5)
    for bits in range(1, 9):
        for kind in ("symmetric", "bipolar", "bytes", "limbs", "tables", "zero_points", "offsets"):
            if kind == "tables" and bits > 4:
                continue
            for shape in SHAPES:
                yield f"{kind}{bits} {shape}", code_matrix(rng, bits, kind, shape)
    for bits in range(1, 5):
        for kind in ("symmetric", "table"):
            for shape in ((64, 128, 16, 64), (33, 192, 32, 192), (40, 96, 48, 0), (1, 320, 16, 0)):
                yield f"m4 {kind}{bits} {shape}", m4_matrix(rng, bits, kind, shape)
    for bits, levels in ((2, (-7, 1, 9)), (3, None), (4, None), (6, None), (4, rng.integers(-127, 128, 16))):
        for shape in ((64, 256, 16, 256), (33, 192, 32, 64), (40, 96, 48, 0)):
            for offsets in (False, True):
                yield f"m8 {bits} {levels} {shape} {offsets}", m8_matrix(rng, bits, shape, offsets, levels)
    for levels in ((-1, 0, 1), (-3, 0.5, 2), (0.3, -0.1, 0.7)):
        for shape in ((64, 128, 64), (33, 192, 0), (40, 100, 0), (17, 320, 64)):
            yield f"base3 {levels} {shape}", base3_matrix(rng, levels, shape)
    for scale_type in ("fp32", "e8m0", "e4m3"):
        yield f"scales {scale_type}", code_matrix(rng, 4, "symmetric", (40, 96, 32), scale_type)
    for kind in ("fp32", "fp16", "bf16"):
        for shape in ((64, 128), (33, 64), (300, 100)):
            yield f"{kind} {shape}", float_matrix(rng, kind, shape)
    yield (
        "two terms",
        PackedMatrix(
            40,
            96,
            code_matrix(rng, 2, "symmetric", (40, 96, 32)).terms
            + code_matrix(rng, 1, "bipolar", (40, 96, 0)).terms,
        ),
    )
    yield (
        "codes and floats",
        PackedMatrix(
            40,
            96,
            code_matrix(rng, 3, "limbs", (40, 96, 16)).terms + float_matrix(rng, "fp16", (40, 96)).terms,
        ),
    )


def inputs(matrix, tokens):
    rng = np.random.default_rng(tokens)
    x = rng.normal(size=(tokens, matrix.in_features)).astype(np.float32)
    x[:, :3] *= 50  # outliers
    if tokens > 2:
        x[1] = 0
        x[2, matrix.in_features // 2 :] = 1e-38  # groups that count as zero
    return x


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("tokens", BATCHES)
def test_equals_reference(tokens, activations):
    for name, matrix in cases():
        x = inputs(matrix, tokens)
        found = matmul(x, matrix, activations)
        bits = 8 if activations == "int8" else 16
        difference = np.abs(found - matmul_reference(x, matrix, bits))
        assert (difference <= matmul_tolerance(x, matrix, bits) + 1e-30).all(), (name, difference.max())


def test_dequantize_equals_the_reference():
    for name, matrix in cases():
        found, expected = _native.dequantize(matrix.native()), matrix.dequantize()
        slack = 1e-6 * np.abs(expected).max()  # sums of terms round once each
        for term in matrix.terms:
            if isinstance(term, CodeTerm):  # levels that fit no two-limb grid are off by up to peak / 32512
                integers, unit = integer_levels(term.levels)
                off = np.abs(integers * unit - term.levels).max()
                slack += 1.01 * off * np.abs(term.effective_scales(matrix.out_features)).max()
        assert np.abs(found - expected).max() <= slack, name


def test_a_token_does_not_see_its_neighbours():
    for name, matrix in cases():
        x = inputs(matrix, 13)
        whole = matmul(x, matrix)
        for count in (1, 2, 5):
            np.testing.assert_array_equal(matmul(x[-count:], matrix), whole[-count:], err_msg=name)


def test_thread_count_does_not_matter():
    try:
        results = []
        for threads in (1, 2, 3, 5):
            _native.set_threads(threads)
            assert _native.threads() == threads
            results.append(digests())
        assert all(result == results[0] for result in results)
    finally:
        _native.set_threads(0)


def digests():
    found, before = {}, _native.crossovers()
    try:
        for name, matrix in cases():
            digest = hashlib.sha256()
            for tokens, most in ((1, 1), (7, 1), (9, 9)):  # gemv, gemm, and few in two tiles
                _native.set_crossovers(1, most)
                for activations in ("int8", "int16"):
                    digest.update(matmul(inputs(matrix, tokens), matrix, activations).tobytes())
            found[name] = digest.hexdigest()
    finally:
        _native.set_crossovers(*before)
    return found


def test_instruction_sets_agree_to_the_bit(same_on_every_isa):
    same_on_every_isa(__file__, digests())


@pytest.mark.parametrize("name", [*FORMATS, "invented"])
def test_every_format_multiplies(name, rng):
    """What round-to-nearest makes of any catalogue format runs natively, an invented one too."""
    fmt = (
        Format.codebook([-3.1, -1, -0.2, 0, 0.3, 0.9, 2, 5], group_size=32)
        if name == "invented"
        else FORMATS[name]
    )
    width = max(fmt.group_size, 64) * 2
    weight = emulate(rng.normal(size=(37, width)).astype(np.float32), FORMATS["bf16"])
    matrix = round_to_nearest(weight, fmt)
    for tokens in (1, 5):
        x = inputs(matrix, tokens)
        difference = np.abs(matmul(x, matrix) - matmul_reference(x, matrix, 8))
        assert (difference <= matmul_tolerance(x, matrix, 8) + 1e-30).all()


def test_the_test_sees_a_flipped_code_and_zeros(rng):
    matrix = code_matrix(rng, 4, "symmetric", (64, 128, 32))
    x = inputs(matrix, 3)
    expected, tolerance = matmul_reference(x, matrix, 8), matmul_tolerance(x, matrix, 8)
    term = matrix.terms[0]
    term.codes.reshape(-1)[1000] ^= 1
    assert (np.abs(matmul(x, PackedMatrix(64, 128, (term,))) - expected) > tolerance).any()
    assert (np.abs(expected) > tolerance).any()


@pytest.mark.parametrize("step", [7, 8, 100, 255])
def test_wide_even_levels_do_not_overflow(step, rng):
    """256 levels up to 255 * step, all inputs positive: as plain integers their sums would leave int32."""
    format = Format.codebook([float(step * c) for c in range(256)], group_size=64)
    weight = np.abs(rng.standard_normal((40, 128))).astype(np.float32)
    matrix = round_to_nearest(weight, format)
    x = np.abs(rng.standard_normal((3, 128))).astype(np.float32) + 1
    for bits in (8, 16):
        for rows in (x, x[:1]):
            error = np.abs(_native.matmul(rows, matrix.native(), bits) - matmul_reference(rows, matrix, bits))
            assert (error <= matmul_tolerance(rows, matrix, bits)).all()


def test_a_nan_is_not_lost(rng):
    """`matmul` refuses NaN; inside the decoder it must come out as NaN, not as a silent zero."""
    matrix = code_matrix(rng, 4, "symmetric", (64, 128, 32))
    x = inputs(matrix, 2)
    x[1, 5] = np.nan
    found = _native.matmul(x, matrix.native())
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


def test_bad_arguments_are_named(rng):
    matrix = round_to_nearest(rng.normal(size=(32, 64)).astype(np.float32), parse_format("int4-g32"))
    with pytest.raises(LowbitError, match="shape"):
        matmul(np.zeros((1, 63), np.float32), matrix)
    with pytest.raises(LowbitError, match="int9"):
        matmul(np.zeros((1, 64), np.float32), matrix, activations="int9")
    with pytest.raises(LowbitError, match="nan"):
        matmul(np.full((1, 64), np.nan, np.float32), matrix)
    native = _native.Matrix(32, 64)
    with pytest.raises(ValueError, match="codes has 3 bytes"):
        native.add_code_term(
            4,
            np.zeros(3, np.uint8),
            "fp16",
            np.zeros((1, 2, 32), np.float16),
            32,
            np.zeros((1, 16), np.float32),
        )
    with pytest.raises(ValueError, match="group_size=24"):
        native.add_code_term(
            4, np.zeros(1024, np.uint8), "fp16", np.zeros(32, np.float16), 24, np.ones((1, 16), np.float32)
        )
    with pytest.raises(ValueError, match="no terms"):
        _native.matmul(np.zeros((1, 64), np.float32), native)
    with pytest.raises(ValueError, match="2\\^31"):
        _native.Matrix(0, 5)


if __name__ == "__main__":
    print(json.dumps({"isa": _native.isa(), **digests()}))
