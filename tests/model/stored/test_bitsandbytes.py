"""What bitsandbytes stores, and double quantizes, decodes to what it dequantizes."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes", reason="pip install --no-deps bitsandbytes")

import bitsandbytes.backends.default.ops as portable  # noqa: E402
import bitsandbytes.functional as bnb  # noqa: E402

from lowbit.errors import CheckpointError, UnsupportedError  # noqa: E402

from .writing import equal, read_matrix  # noqa: E402

CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def quantized(kind, shape, blocksize, double, seed=3):
    """(arrays as Params4bit saves them, what the package dequantizes)."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[0, : min(64, shape[1])] = 0  # a block of zeros
    weight[-1, -1] = 1e30
    packed, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, quant_type=kind, compress_statistics=double
    )
    arrays = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    absmax = state.absmax
    if double:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # Its portable operation: that of AVX-512 misreads rows that are no multiple of the block (0.50).
    args = (packed.reshape(-1), absmax, state.code, blocksize, list(shape), torch.float32)
    expected = portable._dequantize_4bit_compute(*args)
    if shape[1] % blocksize == 0:
        assert torch.equal(expected, bnb.dequantize_4bit(packed, state))
    return arrays, expected


def interop(kind):
    return pytest.mark.interop(type=f"bitsandbytes {kind}", direction="read", against="bitsandbytes")


@interop("NF4 and FP4, with and without double quantization")
@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(kind, double, tmp_path):
    cases = [((32, 128), 64), ((33, 192), 64), ((8, 64), 64), ((16, 256), 128), ((48, 32), 64)]
    for shape, blocksize in cases:
        arrays, expected = quantized(kind, shape, blocksize, double)
        if double:  # the outlier makes the nested scales differ by much
            assert arrays["weight.absmax"].dtype == torch.uint8
        matrix = read_matrix(tmp_path, arrays, CONFIG)
        assert [term.kind for term in matrix.terms] == ["codes"]
        equal(matrix, expected)


@interop("NF4 and FP4, blocks across rows")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_that_do_not_fit_rows(kind, tmp_path):
    """Rows of 48 are cut into pieces of 16; rows of 100 and 33 become float32."""
    for shape, term in [((20, 48), "codes"), ((20, 100), "floats"), ((5, 33), "floats")]:
        arrays, expected = quantized(kind, shape, 64, False)
        matrix = read_matrix(tmp_path, arrays, CONFIG)
        assert matrix.terms[0].kind == term
        equal(matrix, expected)


@interop("LLM.int8() stored weights")
def test_eight_bits(tmp_path):
    """bitsandbytes multiplies (code * scale) / 127 in another order: one unit in the last place."""
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    arrays = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    matrix = read_matrix(tmp_path, arrays, {"load_in_8bit": True, "llm_int8_threshold": 6.0})
    expected = bnb.int8_vectorwise_dequant(codes, scales).numpy()
    found = matrix.dequantize()
    np.testing.assert_array_max_ulp(found, expected, 1)
    assert np.array_equal(matrix.terms[0].unpack(40, 96).astype(int) - 128, codes.numpy())
    arrays["weight_format"] += 1
    with pytest.raises(UnsupportedError, match="rows in the order of a GPU"):
        read_matrix(tmp_path, arrays, {"load_in_8bit": True})


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1 << 40, 64]},
        {"shape": [32, 129]},
        {"shape": [32]},
        {"shape": "x"},
        {"blocksize": 0},
        {"blocksize": 65},
        {"quant_type": "fp4"},
        {"blocksize": None, "shape": None},
    ],
    ids=str,
)
def test_a_hostile_state_is_refused(change, tmp_path):
    arrays, _ = quantized("nf4", (32, 128), 64, False)
    name = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(arrays[name].numpy().tobytes()) | change
    arrays[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError):
        read_matrix(tmp_path, arrays, CONFIG)
    arrays[name] = torch.tensor(list(b"\x80\x04pickled"), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_matrix(tmp_path, arrays, CONFIG)


def test_other_storage_is_refused_by_name(tmp_path):
    arrays, _ = quantized("nf4", (32, 128), 64, False)
    with pytest.raises(UnsupportedError, match=r"bfloat16.*lowbit reads uint8"):
        read_matrix(tmp_path, arrays, CONFIG | {"bnb_4bit_quant_storage": "bfloat16"})
