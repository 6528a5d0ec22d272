"""Methods that find levels, scales or groups of their own: what each promises."""

import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats import Format, parse_format
from lowbit.kernels import matmul
from lowbit.packed import PackedMatrix
from lowbit.quantize.absmax import absmax
from lowbit.quantize.finequant import finequant
from lowbit.quantize.hqq import hqq
from lowbit.quantize.importance import round_by_importance
from lowbit.quantize.kmeans import kmeans
from lowbit.quantize.llm_fp4 import llm_fp4
from lowbit.quantize.methods import parse_method
from lowbit.quantize.parameters import Parameters
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.statistics import Statistics
from lowbit.quantize.zeroquant_fp import zeroquant_fp

rng = np.random.default_rng(11)
WEIGHT = (rng.standard_t(4, (48, 256)) * 0.02).astype(np.float32)
X = (rng.standard_normal((500, 256)) * np.exp(rng.standard_normal(256))).astype(np.float32)
STATISTICS = Statistics(X.T @ X / len(X), np.abs(X).max(axis=0), len(X))
COUNTS = np.diag(STATISTICS.hessian)


def error(matrix, counts=COUNTS):
    return float((np.square(matrix.dequantize() - WEIGHT) @ counts).sum())


def runs(matrix):
    """It is stored, read again, and multiplied with as NumPy does."""
    again = PackedMatrix.from_state(*matrix.state())
    np.testing.assert_array_equal(again.dequantize(), matrix.dequantize())
    expected = X[:4] @ matrix.dequantize().T
    np.testing.assert_allclose(matmul(X[:4], again, "int16"), expected, atol=2e-3 * np.abs(expected).max())


class TestHQQ:
    @pytest.mark.parametrize("name", ["int3a-g64", "int4a-g32", "int2a-row"])
    def test_no_group_ends_with_a_larger_norm(self, name):
        format = parse_format(name)
        start = round_to_nearest(WEIGHT, format)
        found = hqq(WEIGHT, format)
        width = format.scale_size(256) or 256
        norms = [
            np.power(np.abs(m.dequantize() - WEIGHT), 0.7).reshape(48, -1, width).sum(axis=2)
            for m in (found, start)
        ]
        assert (norms[0] <= norms[1] * 1.02).all()
        assert norms[0].sum() < 0.995 * norms[1].sum()
        runs(found)

    def test_offsets_take_the_place_of_zero_points(self):
        found = hqq(WEIGHT, parse_format("int4a-g64")).terms[0]
        assert found.zero_points is None and found.offsets.dtype == np.float16

    def test_errors_of_a_group_cancel(self):
        """With errors below the norm's threshold the offset is their mean: none is left."""
        format = parse_format("int3a-g64")
        means = [
            np.abs((m.dequantize() - WEIGHT).reshape(48, -1, 64).mean(axis=2)).mean()
            for m in (hqq(WEIGHT, format), round_to_nearest(WEIGHT, format))
        ]
        assert means[0] < 0.4 * means[1]

    def test_size_of_the_weights_does_not_matter(self):
        format = parse_format("int3a-g64")
        once, more = hqq(WEIGHT, format), hqq(WEIGHT * np.float32(64), format)
        np.testing.assert_array_equal(more.dequantize(), once.dequantize() * 64)

    @pytest.mark.parametrize(
        "format, options",
        [
            ("bcq2-g64", {}),
            ("bf16", {}),
            ("int4-g64", {}),
            ("int4a-g64", {"p": 1.0}),
            ("int4a-g64", {"beta": 0}),
        ],
    )
    def test_refuses(self, format, options):
        with pytest.raises(FormatError, match="hqq to"):
            hqq(WEIGHT, parse_format(format), **options)


class TestKmeans:
    @pytest.mark.parametrize(
        "name", ["int4-g64", "int3-g32", "int2-row", "nf4-g64", "int3-g32-e8m0", "int1-g64"]
    )
    def test_own_levels_lose_less_than_those_of_the_format(self, name):
        format = parse_format(name)
        found, plain = kmeans(WEIGHT, format, COUNTS), round_by_importance(WEIGHT, format, COUNTS)
        assert found.nbytes == plain.nbytes
        assert error(found) < (1.0001 if name == "int1-g64" else 0.97) * error(plain)
        runs(found)

    def test_few_distinct_weights_are_found_exactly(self):
        levels = np.array([-0.7, -0.1, 0.2, 1.0])
        weight = levels[rng.integers(0, 4, (32, 64))].astype(np.float32)
        found = kmeans(weight, Format.codebook([-1, 0, 0.5, 1], 0, "fp32"))
        np.testing.assert_allclose(found.dequantize(), weight, atol=1e-5)

    def test_compensation_and_descent_with_own_levels(self):
        found = [
            parse_method(text)(WEIGHT, parse_format("int3-g64"), STATISTICS)
            for text in ("kmeans", "kmeans:compensate=yes", "kmeans:refit=2")
        ]
        rests = [m.dequantize() - WEIGHT for m in found]
        errors = [float(np.vdot(r @ STATISTICS.hessian, r)) for r in rests]
        assert errors[2] < errors[1] < errors[0]
        assert {m.nbytes for m in found} == {found[0].nbytes}

    @pytest.mark.parametrize("name", ["int4a-g64", "bitmod3-g64", "bcq2-g64", "int4-g16-m4", "fp16"])
    def test_refuses(self, name):
        with pytest.raises(FormatError, match="kmeans to"):
            kmeans(WEIGHT, parse_format(name))


class TestFloats:
    def test_the_split_of_least_output_error(self):
        found = llm_fp4(WEIGHT, parse_format("e3m0-g64"), STATISTICS)
        tried = [parse_format(f"{name}-g64") for name in ("e1m2", "e2m1", "e3m0")]
        matrices = [round_by_importance(WEIGHT, format, COUNTS) for format in tried]
        rests = [m.dequantize() - WEIGHT for m in matrices]
        best = int(np.argmin([np.vdot(r @ STATISTICS.hessian, r) for r in rests]))
        assert found.format_name == tried[best].name
        np.testing.assert_array_equal(found.dequantize(), matrices[best].dequantize())

    def test_powers_of_two_are_best_kept_in_a_format_without_mantissa(self):
        weight = np.exp2(rng.integers(-6, 1, (32, 64))).astype(np.float32)
        statistics = Statistics(np.eye(64, dtype=np.float32), np.ones(64, np.float32), 1)
        assert llm_fp4(weight, parse_format("e2m1-row"), statistics).format_name == "e3m0-row"

    @pytest.mark.parametrize("name", ["int4-g64", "nf4-g64", "bf16"])
    def test_refuses_what_is_no_float(self, name):
        with pytest.raises(FormatError, match="no minifloat"):
            llm_fp4(WEIGHT, parse_format(name), STATISTICS)

    @pytest.mark.parametrize("name", ["e2m1-g32", "e2m1-g32-fp32", "bitmod3-g64", "int4-g32"])
    @pytest.mark.parametrize("ratios", ["row", "power"])
    def test_ratios_are_powers_of_two(self, name, ratios):
        format = parse_format(name)
        found = zeroquant_fp(WEIGHT, format, ratios)
        scales = np.abs(Parameters.of(found, format).scales[0])
        over = scales / (scales.max(axis=1, keepdims=True) if ratios == "row" else 1)
        exponents = np.log2(over)
        np.testing.assert_allclose(exponents, np.rint(exponents), atol=2e-3)
        plain = error(round_to_nearest(WEIGHT, format), np.ones(256))
        assert plain <= error(found, np.ones(256)) * 1.02 < 3 * plain
        runs(found)

    def test_low_rank_lowers_it(self):
        plain, more = (
            parse_method(text)(WEIGHT, parse_format("e2m1-g32"), STATISTICS)
            for text in ("zqfp", "lorc:base=zqfp,rank=8")
        )
        assert error(more) < error(plain)

    @pytest.mark.parametrize("name", ["mxfp4", "int4a-g64", "bcq2-g64", "int4-g16-m4", "bf16"])
    def test_zqfp_refuses(self, name):
        with pytest.raises(FormatError, match="zqfp to"):
            zeroquant_fp(WEIGHT, parse_format(name))


class TestAbsmax:
    @pytest.mark.parametrize("name", ["int4-row", "int4-g64", "int8-row-fp32", "int2-g32"])
    def test_scale_is_the_largest_over_the_top_level(self, name):
        format = parse_format(name)
        found = absmax(WEIGHT, format)
        width = format.group_size or 256
        largest = np.abs(WEIGHT).reshape(48, -1, width).max(axis=2)
        scales = found.terms[0].effective_scales(48)
        np.testing.assert_allclose(scales, largest / (2 ** (format.bits - 1) - 1), rtol=1e-3)
        assert found.terms[0].unpack(48, 256).min() >= 1
        bound = np.repeat(scales, width, axis=1) * 0.501 + 1e-3 * np.abs(WEIGHT)
        assert (np.abs(found.dequantize() - WEIGHT) <= bound).all()

    @pytest.mark.parametrize("name", ["int4a-g64", "nf4-g64", "int1-g64", "int4-g16-m4", "bf16"])
    def test_refuses(self, name):
        with pytest.raises(FormatError, match="absmax to"):
            absmax(WEIGHT, parse_format(name))


class TestFineQuant:
    def test_groups_become_small_only_where_that_pays(self):
        format = parse_format("int4-row")
        even = np.tile(WEIGHT[:, :1], (1, 256)) * np.sign(rng.standard_normal((48, 256))).astype(np.float32)
        assert finequant(even, format).format_name == "int4-row"
        uneven = rng.standard_normal((48, 256)).astype(np.float32) * np.repeat(
            np.array([3, 1, 1 / 3, 1 / 9], np.float32), 64
        )
        found = finequant(uneven, format)
        assert found.format_name == "int4-g64" == parse_format(found.format_name).name
        np.testing.assert_array_equal(
            found.dequantize(), round_to_nearest(uneven, parse_format("int4-g64")).dequantize()
        )
        assert finequant(uneven, format, smallest=96).format_name == "int4-g128"
        assert finequant(uneven, format, demand=1000.0).format_name == "int4-row"

    @pytest.mark.parametrize("format, options", [("bf16", {}), ("int4-g64", {"demand": 0.0})])
    def test_refuses(self, format, options):
        with pytest.raises(FormatError, match="finequant to"):
            finequant(WEIGHT, parse_format(format), **options)
