"""Splitting quantizers: outlier columns and entries, low rank, sparsity."""

import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats import parse_format
from lowbit.quantize import low_rank, refine_rows, round_to_nearest, sparse, split_columns, split_entries
from lowbit.quantize.sparse import kept_weights


@pytest.fixture
def weight(rng):
    w = rng.standard_normal((48, 128)).astype(np.float32)
    w[:, [5, 70]] *= 40
    return w


def error(matrix, weight):
    return float(np.square(matrix.dequantize() - weight, dtype=np.float64).sum())


@pytest.mark.parametrize("exclude", [True, False])
def test_columns_keep_their_weights_and_spare_the_others(weight, exclude):
    matrix = split_columns(weight, "int4-g32", 2, exclude=exclude)
    assert matrix.terms[1].columns.tolist() == [5, 70] and matrix.format_name == "int4-g32+2columns"
    decoded = matrix.dequantize()
    np.testing.assert_allclose(decoded[:, [5, 70]], weight[:, [5, 70]], rtol=2**-10, atol=1e-3)
    others = np.delete(np.arange(128), [5, 70])
    rest = weight.copy()
    rest[:, [5, 70]] = 0
    expected = round_to_nearest(rest, parse_format("int4-g32")).dequantize()
    np.testing.assert_array_equal(decoded[:, others], expected[:, others])
    assert error(matrix, weight) < 0.2 * error(round_to_nearest(weight, parse_format("int4-g32")), weight)


def test_columns_may_be_named_or_ranked(weight, rng):
    named = split_columns(weight, "int4-g32", [9, 3, 9])
    assert named.terms[1].columns.tolist() == [3, 9]
    importance = np.zeros(128)
    importance[[11, 100]] = 5
    assert split_columns(weight, "int4-g32", 2, importance).terms[1].columns.tolist() == [11, 100]
    for bad in ([128], [-1], [], 0, 129, [0.5]):
        with pytest.raises(FormatError, match="split_columns"):
            split_columns(weight, "int4-g32", bad)
    with pytest.raises(FormatError, match="importance"):
        split_columns(weight, "int4-g32", 2, np.ones(5))
    with pytest.raises(FormatError, match="range of fp16"):
        split_columns(weight * 1e6, "int4-g32", 2)


def test_formats_without_a_zero_lose_nothing_in_excluded_columns(weight):
    decoded = split_columns(weight, "int1-g32", [5, 70]).dequantize()
    np.testing.assert_allclose(decoded[:, [5, 70]], weight[:, [5, 70]], rtol=2**-10)


def test_entries_are_the_largest_and_nearly_exact(weight):
    matrix = split_entries(weight, "int3-g64", 0.02)
    rows, columns = matrix.terms[1].places()
    assert len(rows) == round(0.02 * weight.size)
    size = np.abs(weight)
    assert size[rows, columns].min() >= np.sort(size.reshape(-1))[-len(rows)]
    decoded = matrix.dequantize()[rows, columns]
    np.testing.assert_allclose(decoded, weight[rows, columns], rtol=2**-9, atol=1e-3)
    assert error(matrix, weight) < error(round_to_nearest(weight, parse_format("int3-g64")), weight)
    with pytest.raises(FormatError, match="fraction"):
        split_entries(weight, "int3-g64", 0)


def test_low_rank_takes_the_largest_part_of_the_error(weight):
    plain = round_to_nearest(weight, parse_format("int2-g64"))
    values = np.linalg.svd(weight - plain.dequantize(), compute_uv=False)
    for rank in (1, 8, 48):
        matrix = low_rank(weight, "int2-g64", rank)
        best = np.square(values[rank:]).sum()
        assert matrix.terms[1].rank == rank
        assert error(matrix, weight) <= 1.01 * best + 1e-5 * error(plain, weight)
    with pytest.raises(FormatError, match="rank=49"):
        low_rank(weight, "int2-g64", 49)


def test_low_rank_counts_errors_by_importance(weight, rng):
    importance = np.exp(rng.normal(size=128))
    weighed, plain = (low_rank(weight, "int2-g64", 8, i).dequantize() for i in (importance, None))
    assert np.square((weighed - weight) * importance).sum() < np.square((plain - weight) * importance).sum()


def test_randomized_decomposition_is_near_the_exact_one(monkeypatch, rng):
    import sys

    from lowbit.quantize import low_rank as _  # noqa: F401

    module = sys.modules["lowbit.quantize.low_rank"]
    w = (rng.standard_normal((96, 20)) @ rng.standard_normal((20, 160))).astype(np.float32)
    exact = error(low_rank(w, "int1-row", 12), w)
    monkeypatch.setattr(module, "_EXACT", 0)
    assert error(low_rank(w, "int1-row", 12), w) <= 1.02 * exact


@pytest.mark.parametrize("density", [0.5, 0.1, 1.0, "2:4"])
def test_sparse_keeps_the_largest(weight, density):
    matrix = sparse(weight, "int4-g32", density)
    kept = kept_weights(weight, density)
    decoded = matrix.dequantize()
    assert (decoded[~kept] == 0).all()
    dense = round_to_nearest(np.where(kept, weight, 0).astype(np.float32), parse_format("int4-g32"))
    np.testing.assert_array_equal(decoded, dense.dequantize())
    if density == "2:4":
        assert (kept.reshape(-1, 4).sum(axis=1) == 2).all()
    else:
        assert (kept.sum(axis=1) == round(density * 128)).all()
    share = 0.5 if density == "2:4" else density
    wide = sparse(np.tile(weight, (1, 8)), "int4-g64", density)
    rows = 64 / 48  # of padding
    assert wide.bits_per_weight == pytest.approx(rows * (1 + 16 / 64) + 4 * share, abs=0.05)


def test_sparse_refuses_what_has_no_zero(weight):
    for name in ("int1-g32", "int4a-g32", "bcq2-g128", "bitmod4-g128", "fp16"):
        with pytest.raises(FormatError, match="sparse"):
            sparse(weight, name)
    with pytest.raises(FormatError, match="density"):
        sparse(weight, "int4-g32", 0)
    with pytest.raises(FormatError, match="fours"):
        sparse(np.ones((4, 90), np.float32), "int4-row", "2:4")


def test_refined_rows_have_eight_bits_and_the_others_stay(weight):
    four, eight = (round_to_nearest(weight, parse_format(f"int{bits}-g32")) for bits in (4, 8))
    matrix = refine_rows(four, weight, [40, 2, 40], "int4-g32")
    assert matrix.terms[1].rows.tolist() == [2, 40] and matrix.format_name == "int4-g32+2rows"
    others = np.delete(np.arange(48), [2, 40])
    np.testing.assert_array_equal(matrix.dequantize()[others], four.dequantize()[others])
    rest = np.square(matrix.dequantize() - weight)[[2, 40]].sum()
    assert rest < 2 * np.square(eight.dequantize() - weight)[[2, 40]].sum()
    # two rows of 128 at 4.5 bits take a block of 32 of them, and their numbers
    assert matrix.nbytes == four.nbytes + 32 * 128 // 2 + 4 * 32 * 2 + 16 * 4 + 2 * 4
    assert refine_rows(four, weight, [], "int4-g32") is four
    for bad in ([48], [-1], [0.5]):
        with pytest.raises(FormatError, match="refine_rows"):
            refine_rows(four, weight, bad, "int4-g32")
    for format in ("fp16", "bcq2-g32"):
        with pytest.raises(FormatError, match="single term"):
            refine_rows(four, weight, [1], format)
