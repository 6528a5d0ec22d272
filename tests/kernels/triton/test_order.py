"""The GPU order of a matrix: it loses nothing, and every kind of term has one."""

import numpy as np
import pytest

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import FORMATS
from lowbit.packed import PackedMatrix, SparseTerm

from .matrices import codes_term, of_format, side_matrices

pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
pytest.importorskip("triton", reason="needs Triton: pip install triton")

from lowbit.kernels.triton import order, words  # after the skips

SIDES = side_matrices()


def check_same(matrix, restored):
    meta, arrays = matrix.state()
    restored_meta, restored_arrays = restored.state()
    assert meta == restored_meta
    assert sorted(arrays) == sorted(restored_arrays)
    for name, array in arrays.items():
        assert array.dtype == restored_arrays[name].dtype
        np.testing.assert_array_equal(array, restored_arrays[name], name)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_comes_back(name, device):
    matrix = of_format(name)
    restored = order.to_device(matrix, device).restore()
    if FORMATS[name].coded:  # bfloat16 on the device
        np.testing.assert_array_equal(matrix.dequantize(), restored.dequantize())
    else:
        check_same(matrix, restored)


@pytest.mark.parametrize("name", SIDES)
def test_every_kind_of_term_comes_back(name, device):
    matrix = SIDES[name]
    restored = order.to_device(matrix, device).restore()
    if isinstance(matrix.terms[0], SparseTerm):  # dense on the device
        np.testing.assert_array_equal(matrix.dequantize(), restored.dequantize())
    else:
        check_same(matrix, restored)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 16), (64, 64), (65, 100), (3, 1000)])
def test_planes_hold_every_code(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, shape).astype(np.uint8)
    planes = words.plane_words(codes, bits)
    assert (
        sum(p.nbytes for p in planes) == words.padded(shape[0], 64) * words.padded(shape[1], 64) * bits // 8
    )
    np.testing.assert_array_equal(words.codes_of_planes(planes, bits, *shape), codes)


def test_ternary_bytes_hold_every_five_codes():
    codes = np.array(np.meshgrid(*[range(3)] * 5)).reshape(5, -1).T.reshape(1, -1).astype(np.uint8)
    assert codes.size == 5 * 243
    packed = words.trit_words(codes)
    np.testing.assert_array_equal(words.codes_of_trits(packed, *codes.shape), codes)
    assert packed.shape[0] * 20 >= codes.size
    packed[3, 0] ^= 64
    assert (words.codes_of_trits(packed, *codes.shape) != codes).any()


def test_damaged_codes_are_refused(device):
    term = codes_term(np.random.default_rng(0), 4, 32, 64, 64)
    damaged = PackedMatrix(32, 64, (type(term)(**{**term.__dict__, "levels": term.levels[:, :9]}),))
    with pytest.raises(FormatError, match="the table has 9 levels"):
        order.to_device(damaged, device)


def test_an_unknown_kind_of_term_is_named(device):
    class Strange:
        kind = "strange"
        quantized = False

        def check(self, out_features, in_features):
            pass

    with pytest.raises(UnsupportedError, match="'strange' has no kernel"):
        order.to_device(PackedMatrix(32, 64, (Strange(),)), device)
