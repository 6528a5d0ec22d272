"""Products of the GPU kernels against kernels/reference.py: every format, every kind of term, any batch."""

import numpy as np
import pytest

from lowbit.errors import UnsupportedError
from lowbit.formats import FORMATS
from lowbit.kernels.reference import matmul_reference, matmul_tolerance, quantize_activations
from lowbit.packed import PackedMatrix

from .matrices import codes_term, of_format, side_matrices

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
pytest.importorskip("triton", reason="needs Triton: pip install triton")

from lowbit.kernels.triton import launch, lookup, matmul, to_device  # noqa: E402  # after the skips

SIDES = side_matrices()
BATCHES = (1, 2, 3, 16, 17, 64, 100)
SHAPES = [(1, 16, 0), (63, 48, 16), (64, 176, 176), (65, 528, 48), (130, 704, 64)]
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def activations(batch, in_features, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, in_features), dtype=np.float32)


def product(x, matrix, device, kind="float", dtype=torch.float32):
    y = matmul(torch.from_numpy(x).to(device, dtype), to_device(matrix, device), kind)
    assert y.dtype == dtype
    return y.float().cpu().numpy()


def check(x, matrix, device, kind="float"):
    bits = 8 if kind == "int8" else None
    error = np.abs(product(x, matrix, device, kind) - matmul_reference(x, matrix, bits))
    assert (error <= matmul_tolerance(x, matrix, bits)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_equals_the_reference(name, device):
    matrix, x = of_format(name), activations(3, 384)
    check(x, matrix, device)
    check(x, matrix, device, "int8")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes_exactly(name, device):
    matrix = of_format(name)
    rows = torch.tensor([3, 69, 0, 17, 3], device=device)
    found = lookup(to_device(matrix, device), rows).cpu().numpy()
    np.testing.assert_array_equal(found, matrix.dequantize()[rows.cpu().numpy()])


@pytest.mark.parametrize("name", SIDES)
def test_every_kind_of_term_equals_the_reference(name, device):
    matrix, x = SIDES[name], activations(5, 192)
    x[:, :7] *= 30  # outliers, some of them excluded from the codes
    check(x, matrix, device)
    check(x, matrix, device, "int8")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", (1, 3, 4, 7, 8))
def test_odd_shapes(shape, bits, device):
    matrix = PackedMatrix(shape[0], shape[1], (codes_term(np.random.default_rng(bits), bits, *shape),))
    x = activations(2, shape[1])
    check(x, matrix, device)
    check(x, matrix, device, "int8")


@pytest.mark.parametrize("name", ["int4-g64", "ternary", "int3-g16-m4", "bf16"])
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(name, batch, device):
    check(activations(batch, 384), of_format(name), device)


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].float_type is None])
def test_fp8_activations(name, device):
    """Against float64 on the activations as they were rounded; formats that e4m3 cannot hold are refused."""
    matrix, x = of_format(name), activations(3, 384)
    held = torch.from_numpy(np.concatenate([t.levels.ravel() for t in matrix.terms]))
    exact = torch.equal(held.to(torch.float8_e4m3fn).float(), held)
    if not exact or any(t.multipliers is not None or t.zero_points is not None for t in matrix.terms):
        with pytest.raises(UnsupportedError, match="levels that e4m3 holds"):
            product(x, matrix, device, "fp8")
        return
    values, scales = launch.quantize_float8(torch.from_numpy(x))
    rounded = (values.float().view(3, -1, 64) * scales[:, :, None]).view(3, -1).numpy()
    assert np.abs(rounded - x).max() <= np.abs(x).max() * 2**-4  # half a step of three bits of mantissa
    error = np.abs(product(x, matrix, device, "fp8") - matmul_reference(rounded, matrix, None))
    assert (error <= matmul_tolerance(rounded, matrix, None)).all()


@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("name", ["int4-g64", "nf4-g64", "bf16"])
def test_half_precision(name, dtype, device):
    """Weights and the result are rounded once each to the type; sums are float32."""
    matrix = of_format(name)
    x = torch.from_numpy(activations(3, 384)).to(dtype).float().numpy()
    exact = matmul_reference(x, matrix, None)
    sums = np.abs(x.astype(np.float64)) @ np.abs(matrix.dequantize()).T.astype(np.float64)
    tolerance = HALF_ULP[dtype] * (sums + np.abs(exact)) * 1.01 + matmul_tolerance(x, matrix, None)
    assert (np.abs(product(x, matrix, device, dtype=dtype) - exact) <= tolerance).all()


@pytest.mark.parametrize("kind", ["float", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_the_same_bits_in_every_batch(kind, dtype, device):
    matrix = PackedMatrix(70, 704, (codes_term(np.random.default_rng(3), 4, 70, 704, 32),))
    assert launch.splits_of(70, 704)[0] > 1  # sums of splits are compared, too
    moved = to_device(matrix, device)
    x = torch.from_numpy(activations(100, 704)).to(device, dtype)
    whole = matmul(x, moved, kind)
    for begin, end in ((0, 1), (7, 9), (5, 21), (3, 20), (36, 100), (99, 100), (0, 65)):
        assert torch.equal(matmul(x[begin:end], moved, kind), whole[begin:end]), (begin, end)


def test_side_terms_are_the_same_bits_in_every_batch(device):
    moved = to_device(SIDES["all"], device)
    x = torch.from_numpy(activations(70, 192)).to(device)
    whole = matmul(x, moved)
    for begin, end in ((0, 1), (3, 20), (69, 70)):
        assert torch.equal(matmul(x[begin:end], moved), whole[begin:end])


def test_activations_round_as_the_reference_rounds(device):
    x = activations(5, 200)
    x[2] = 0
    x[3, :64] *= 1e-31
    integers, scales = launch.quantize_int8(torch.from_numpy(x).to(device))
    expected, expected_scales = quantize_activations(x, 8)
    np.testing.assert_array_equal(integers.cpu().numpy(), expected)
    np.testing.assert_array_equal(scales.cpu().numpy(), expected_scales)


def test_integer_sums_are_exact(device):
    """With scales of powers of two nothing is rounded, so that the result is the integer."""
    rng = np.random.default_rng(4)
    term = codes_term(rng, 8, 33, 256, 0)
    term.scales[:] = 1
    matrix = PackedMatrix(33, 256, (term,))
    x = rng.integers(-127, 128, (3, 256)).astype(np.float32)
    x[:, ::64] = 127
    np.testing.assert_array_equal(product(x, matrix, device, "int8"), matmul_reference(x, matrix, 8))


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_one_flipped_code_fails(kind, device):
    matrix, x = of_format("int4-g64"), activations(3, 384)
    damaged = to_device(matrix, device)
    damaged.terms[0].planes[0][0, 5] ^= 1
    y = matmul(torch.from_numpy(x).to(device), damaged, kind).cpu().numpy()
    bits = 8 if kind == "int8" else None
    error = np.abs(y - matmul_reference(x, matrix, bits)) > matmul_tolerance(x, matrix, bits)
    assert error[:, 5].all()
    assert not np.delete(error, 5, axis=1).any()


def test_splits_depend_on_the_shape_alone():
    for rows, inputs in ((4096, 4096), (64, 64), (8192, 8192), (1, 100000)):
        splits, per_split = launch.splits_of(rows, inputs)
        blocks = -(-inputs // 64)
        assert (splits - 1) * per_split < blocks <= splits * per_split
