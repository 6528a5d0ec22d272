"""Products with float weights: one running sum in input order, whatever kernel computes it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lowbit import _native
from lowbit.kernels import matmul
from lowbit.kernels.reference import matmul_reference, matmul_tolerance
from lowbit.packed import EntropyTerm, FloatTerm, PackedMatrix
from lowbit.packed.layout import pack_values

SHAPES = [(1, 1), (31, 7), (33, 257), (64, 256), (70, 515), (300, 100)]


def float_matrix(kind, shape):
    values = np.random.default_rng(7).normal(size=shape).astype(np.float32)
    if kind == "fp16":
        values = values.astype(np.float16)
    elif kind == "bf16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    return PackedMatrix(*shape, (FloatTerm(kind, pack_values(values)),))


def coded_matrix(kind, shape):
    """Coded bfloat16: normal weights, or some of wide range, whose exponents take escapes of every kind."""
    rng = np.random.default_rng(8)
    values = rng.normal(size=shape).astype(np.float32)
    if kind == "wide":
        values *= np.exp2(rng.integers(-40, 40, shape) * (rng.random(shape) < 0.3)).astype(np.float32)
        values[:, ::5] = 0
    elif kind == "one escape":
        values[:] = 1
        values[-1, -1] = -2e-39  # subnormal
    return PackedMatrix(*shape, (EntropyTerm.of((values.view(np.uint32) >> 16).astype(np.uint16)),))


def cases():
    for kind in ("fp32", "fp16", "bf16"):
        for shape in SHAPES:
            yield f"{kind} {shape}", float_matrix(kind, shape)
    for kind in ("normal", "wide", "one escape"):
        for shape in SHAPES:
            yield f"coded {kind} {shape}", coded_matrix(kind, shape)


def inputs(matrix, tokens):
    return np.random.default_rng(tokens).normal(size=(tokens, matrix.in_features)).astype(np.float32)


def in_order(x, weights):
    """The definition: float32 sums over the inputs in order, each product added with one rounding.

    A product of two float32 is exact in float64, and so is its sum with a float32 of similar size; what
    rounds twice in float64 differs in the last bit, rarely.
    """
    total = np.zeros((len(x), len(weights)), np.float32)
    for k in range(x.shape[1]):
        exact = x[:, k, None].astype(np.float64) * weights[None, :, k] + total
        total = exact.astype(np.float32)
    return total


@pytest.mark.parametrize("tokens", [1, 2, 14, 97])
def test_equals_the_definition(tokens):
    for name, matrix in cases():
        x = inputs(matrix, tokens)
        found = matmul(x, matrix)
        difference = np.abs(found - matmul_reference(x, matrix))
        assert (difference <= matmul_tolerance(x, matrix) + 1e-30).all(), name  # subnormal sums round more
        assert np.mean(found != in_order(x, matrix.dequantize())) < 1e-3, name


def test_every_batch_gives_the_bits_of_one_token():
    for name, matrix in cases():
        x = inputs(matrix, 27)
        alone = np.concatenate([matmul(x[i : i + 1], matrix) for i in range(27)])
        for tokens in range(2, 28):
            np.testing.assert_array_equal(matmul(x[:tokens], matrix), alone[:tokens], err_msg=name)


def digests():
    return {
        name: [hashlib.sha256(matmul(inputs(matrix, n), matrix).tobytes()).hexdigest() for n in (1, 2, 29)]
        for name, matrix in cases()
    }


def test_instruction_sets_agree_to_the_bit():
    expected = digests()
    for isa in _native.supported_isas():
        done = subprocess.run(
            [sys.executable, str(Path(__file__))],
            env={**os.environ, "LOWBIT_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == [isa, expected]


def test_coded_weights_give_the_bits_of_plain_ones():
    for kind in ("normal", "wide", "one escape"):
        for shape in SHAPES:
            coded = coded_matrix(kind, shape)
            bits = (coded.dequantize().view(np.uint32) >> 16).astype(np.uint16)
            plain = PackedMatrix(*shape, (FloatTerm("bf16", pack_values(bits)),))
            for tokens in (1, 5):
                x = inputs(coded, tokens)
                np.testing.assert_array_equal(matmul(x, coded), matmul(x, plain), err_msg=f"{kind} {shape}")
            np.testing.assert_array_equal(_native.dequantize(coded.native()), coded.dequantize())


def test_the_test_sees_a_flipped_bit_and_zeros():
    matrix = float_matrix("bf16", (64, 256))
    x = inputs(matrix, 2)
    expected = in_order(x, matrix.dequantize())
    matrix.terms[0].values[1, 200, 3] ^= 16
    assert (matmul(x, matrix) != expected)[:, 35].all()
    matrix.terms[0].values[:] = 0
    assert (matmul(x, matrix) == 0).all()
    coded = coded_matrix("normal", (64, 256))
    expected = matmul(x, coded)
    coded.terms[0].codes[1, 50, 48 + 3] ^= 16  # a mantissa of row 35
    assert ((matmul(x, coded) != expected).any(axis=0).nonzero()[0] == [35]).all()


if __name__ == "__main__":
    print(json.dumps([_native.isa(), digests()]))
