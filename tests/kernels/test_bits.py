"""Many tokens times one-bit codes, which some instruction sets look up as sums instead of multiplying."""

import hashlib
import json

import numpy as np
import pytest

from lowbit import _native
from lowbit.kernels import matmul
from lowbit.kernels.reference import matmul_reference, matmul_tolerance
from lowbit.packed import CodeTerm, PackedMatrix, pack_codes
from lowbit.packed.layout import pack_groups

ROWS = 530  # a last block that is cut, and blocks enough for two threads
# (levels, planes, in_features, group_size): inputs are taken 512 at a time, so that some are left.
CASES = [
    ((-1, 1), 1, 704, 64),
    ((-1, 1), 3, 640, 128),
    ((0, 1), 1, 64, 64),
    ((-1, 2), 2, 1024, 256),
    ((-5, -3), 1, 1536, 512),
]
NOT_COVERED = [((1, -1), 1, 192, 64), ((-1, 1), 1, 96, 32), ((-2, 2), 1, 128, 64), ((0, 1), 1, 1024, 0)]
TOKENS = 23


def plane(rng, levels, in_features, group_size, codes=None):
    groups = in_features // group_size if group_size else 1
    if codes is None:
        codes = rng.integers(0, 2, (ROWS, in_features)).astype(np.uint8)
    scales = rng.uniform(-2, 2, (ROWS, groups)).astype(np.float16)
    return CodeTerm(
        1,
        np.float32([levels]),
        pack_codes(codes, 1),
        pack_groups(scales),
        "fp16",
        group_size,
        tensor_scale=0.5,
    )


def matrices():
    rng = np.random.default_rng(11)
    for levels, planes, in_features, group_size in CASES + NOT_COVERED:
        terms = tuple(plane(rng, levels, in_features, group_size) for _ in range(planes))
        yield f"{planes} x {levels}, {in_features}, {group_size}", PackedMatrix(ROWS, in_features, terms)


def inputs(matrix, tokens=TOKENS):
    rng = np.random.default_rng(matrix.in_features)
    return rng.normal(size=(tokens, matrix.in_features)).astype(np.float32)


def digests():
    return {
        name: hashlib.sha256(matmul(inputs(matrix), matrix).tobytes()).hexdigest()
        for name, matrix in matrices()
    }


def test_against_the_reference():
    for name, matrix in matrices():
        x = inputs(matrix)
        difference = np.abs(matmul(x, matrix) - matmul_reference(x, matrix, 8))
        assert (difference <= matmul_tolerance(x, matrix, 8)).all(), name


def test_every_number_of_tokens_gives_the_bits_of_one():
    for name, matrix in matrices():
        x = inputs(matrix)
        alone = np.concatenate([matmul(row[None], matrix) for row in x])
        for tokens in (2, 3, 4, 5, 18, TOKENS):
            np.testing.assert_array_equal(matmul(x[:tokens], matrix), alone[:tokens], err_msg=name)


def test_the_largest_sums(rng):
    """Every code set and every input at its largest magnitude: the bytes of the sums must not overflow."""
    for code in (0, 1):
        codes = np.full((ROWS, 128), code, np.uint8)
        matrix = PackedMatrix(ROWS, 128, (plane(rng, (-1, 2), 128, 64, codes),))
        signs = rng.choice(np.float32([-1, 1]), (TOKENS, 128))
        for x in (np.ones((TOKENS, 128), np.float32), -np.ones((TOKENS, 128), np.float32), signs):
            difference = np.abs(matmul(x, matrix) - matmul_reference(x, matrix, 8))
            assert (difference <= matmul_tolerance(x, matrix, 8)).all()


def test_thread_count_does_not_matter():
    try:
        results = []
        for threads in (1, 2, 5):  # five threads have too few rows each for tables
            _native.set_threads(threads)
            results.append(digests())
        assert all(result == results[0] for result in results)
    finally:
        _native.set_threads(0)


def test_instruction_sets_agree_to_the_bit(same_on_every_isa):
    same_on_every_isa(__file__, digests())


@pytest.mark.skipif(_native.isa() != "avx512", reason="only AVX-512 looks one-bit codes up")
def test_which_kernel_runs():
    try:
        _native.set_threads(1)
        kernels = [matrix.native().kernel(100) for _, matrix in matrices()]
        assert kernels == ["bits"] * len(CASES) + ["gemm"] * len(NOT_COVERED)
        first = next(matrices())[1].native()
        assert first.kernel(100, 16) == "gemm" and first.kernel(1) == "gemv"
    finally:
        _native.set_threads(0)


def test_the_test_sees_a_flipped_code(rng):
    codes = rng.integers(0, 2, (ROWS, 128)).astype(np.uint8)
    matrix = PackedMatrix(ROWS, 128, (plane(np.random.default_rng(1), (-1, 1), 128, 64, codes),))
    x = inputs(matrix)
    expected, tolerance = matmul_reference(x, matrix, 8), matmul_tolerance(x, matrix, 8)
    codes[529, 127] ^= 1
    flipped = PackedMatrix(ROWS, 128, (plane(np.random.default_rng(1), (-1, 1), 128, 64, codes),))
    assert (np.abs(matmul(x, flipped) - expected) > tolerance).any()


if __name__ == "__main__":
    print(json.dumps({"isa": _native.isa(), **digests()}))
