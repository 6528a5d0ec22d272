"""FP8, ternary and MXFP4 weights decode to the numbers of transformers' own integration."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lowbit.errors import CheckpointError, UnsupportedError  # noqa: E402
from lowbit.model.sources import Source  # noqa: E402

from .writing import equal, read_matrix, scales_of, stored_tensors  # noqa: E402


def interop(kind, against="transformers"):
    return pytest.mark.interop(type=kind, direction="read", against=against)


def every_fp8(out, inputs, dtype=torch.float8_e4m3fn):
    generator = torch.Generator().manual_seed(out)
    codes = torch.randint(0, 256, (out, inputs), generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F >= (0x7F if dtype == torch.float8_e4m3fn else 0x7C)] = 0x08
    return codes.view(dtype)


@interop("FP8 per tensor, and in blocks of 128 x 128")
@pytest.mark.parametrize("shape", [(256, 384), (130, 256), (96, 200), (128, 64)])
def test_fp8_in_blocks(shape, tmp_path):
    dequantize = pytest.importorskip("transformers.integrations.finegrained_fp8")._dequantize_fp8_weight
    generator = torch.Generator().manual_seed(0)
    weight = every_fp8(*shape)
    scales = scales_of(generator, -(-shape[0] // 128), -(-shape[1] // 128))
    if scales.numel() == 1:
        scales[:] = 0.037
    padded = torch.zeros(scales.shape[0] * 128, scales.shape[1] * 128, dtype=torch.uint8).view(weight.dtype)
    padded[: shape[0], : shape[1]] = weight
    expected = dequantize(padded, scales, [128, 128], torch.float32)[: shape[0], : shape[1]]
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    equal(read_matrix(tmp_path, {"weight": weight, "weight_scale_inv": scales}, config), expected)
    one = {"weight": weight, "weight_scale_inv": torch.tensor(0.02)}
    expected = dequantize(weight, torch.tensor(0.02), None, torch.float32)
    equal(read_matrix(tmp_path, one, {"quant_method": "fp8", "weight_block_size": None}), expected)


@interop("FP8 scales that are powers of two (ue8m0)", "torch.float8_e8m0fnu")
def test_fp8_with_powers_of_two(tmp_path):
    weight = every_fp8(256, 256)
    scales = torch.tensor([[100, 127], [130, 0]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    wide = scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    matrix = read_matrix(tmp_path, {"weight": weight, "weight_scale_inv": scales}, config)
    np.testing.assert_allclose(matrix.dequantize(), (weight.float() * wide).numpy(), rtol=0, atol=2.0**-135)


@interop("FP8 per channel (fbgemm_fp8) and e5m2", "torch.float8_e4m3fn, float8_e5m2")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_per_channel(dtype, tmp_path):
    weight, scales = every_fp8(40, 96, dtype), scales_of(torch.Generator().manual_seed(2), 40, 1)
    scales[20] = 3.0
    arrays = {"weight": weight, "weight_scale": scales, "input_scale_ub": torch.tensor(1200.0)}
    equal(read_matrix(tmp_path, arrays, {"quant_method": "fbgemm_fp8"}), weight.float() * scales)
    arrays["weight"].view(torch.uint8)[3, 3] = 0x7F
    with pytest.raises(CheckpointError, match="NaN"):
        read_matrix(tmp_path, arrays, {"quant_method": "fbgemm_fp8"})


@interop("HF bitnet, BitLinear (divides) and AutoBitLinear (multiplies)")
@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("scale", [1.22, 0.0078125, 37.5])
def test_bitnet(linear_class, scale, tmp_path):
    from transformers.integrations.bitnet import VALUES_PER_ITEM, pack_weights

    generator = torch.Generator().manual_seed(4)
    ternary = torch.randint(-1, 2, (72, 100), generator=generator).float()
    scales = torch.tensor([scale], dtype=torch.bfloat16)
    arrays = {"weight": pack_weights(ternary.clone()), "weight_scale": scales}
    assert VALUES_PER_ITEM * len(arrays["weight"]) == 72
    config = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    matrix = read_matrix(tmp_path, arrays, config)
    wide = arrays["weight_scale"].float()
    # post_quant_process divides the product by the scale; AutoBitLinear multiplies its output with it
    equal(matrix, ternary * wide if linear_class == "autobitlinear" else ternary / wide)
    assert matrix.terms[0].packing == "base3"
    floats = arrays | {"weight": ternary.bfloat16()}
    if linear_class == "autobitlinear":
        equal(read_matrix(tmp_path, floats, config), ternary * wide)
        floats["weight"][0, 0] = 0.5
        with pytest.raises(UnsupportedError, match="other numbers than"):
            read_matrix(tmp_path, floats, config)


@interop("HF bitnet, AutoBitLinear online (floats)")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_bitnet_rounded_at_every_call(dtype, tmp_path):
    """Its floats become what WeightQuant makes of them; matrices that are not converted stay floats."""
    rounding = pytest.importorskip("transformers.integrations.bitnet").WeightQuant
    torch._dynamo.config.disable = True
    weight = (torch.randn(72, 100, generator=torch.Generator().manual_seed(6)) * 0.03).to(dtype)
    config = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    matrix = read_matrix(tmp_path, {"weight": weight}, config)
    if dtype == torch.float32:  # the mean is summed in another order
        np.testing.assert_allclose(matrix.dequantize(), rounding.apply(weight).numpy(), rtol=1e-6)
    else:
        equal(matrix, rounding.apply(weight))
    stem = "model.layers.0.mlp.up_proj"
    kept = stored_tensors(
        tmp_path, {f"{stem}.weight": weight}, config | {"modules_to_not_convert": ["up_proj"]}
    )
    assert not kept.packed(f"{stem}.weight")


@interop("HF bitnet, whole layers")
def test_a_bitnet_layer_computes_the_same(tmp_path):
    """BitLinear with activations that are integers already: its rounding and ours change nothing."""
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    from lowbit.kernels import matmul

    generator = torch.Generator().manual_seed(4)
    ternary = torch.randint(-1, 2, (64, 64), generator=generator).float()
    layer = bitnet.BitLinear(64, 64, bias=False, dtype=torch.float32)
    layer.weight, layer.weight_scale = bitnet.pack_weights(ternary.clone()), torch.tensor([1.7])
    x = torch.randint(-127, 128, (5, 64), generator=generator).float()
    x[:, 0] = 127
    torch._dynamo.config.disable = True
    arrays = {"weight": layer.weight, "weight_scale": layer.weight_scale}
    matrix = read_matrix(tmp_path, arrays, {"quant_method": "bitnet"})
    np.testing.assert_allclose(matmul(x.numpy(), matrix), layer(x).detach().numpy(), rtol=1e-5, atol=1e-4)


def test_ternary_weights_that_cannot_be_are_refused(tmp_path):
    arrays = {"weight": torch.zeros(8, 64, dtype=torch.uint8), "weight_scale": torch.tensor([0.0])}
    with pytest.raises(CheckpointError, match="divided by it"):
        read_matrix(tmp_path, arrays, {"quant_method": "bitnet"})
    arrays["weight"][1, 1] = 0b11_00_00
    with pytest.raises(CheckpointError, match="code of 3"):
        read_matrix(tmp_path, arrays, {"quant_method": "bitnet"})
    with pytest.raises(UnsupportedError, match="'bitlinear' and quantization_mode='online'"):
        read_matrix(tmp_path, arrays, {"quant_method": "bitnet", "quantization_mode": "online"})
    with pytest.raises(UnsupportedError, match="use_rms_norm"):
        read_matrix(tmp_path, arrays, {"quant_method": "bitnet", "use_rms_norm": True})


@interop("MXFP4 experts of gpt-oss")
def test_mxfp4_experts(tmp_path):
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    generator = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 256, (3, 48, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 48, 2), generator=generator, dtype=torch.uint8)
    scales[0, 0, 0], scales[0, 0, 1] = 1, 254
    expected = convert(blocks.clone(), scales.clone(), dtype=torch.float32)  # [experts, in, out]
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    arrays = {f"{stem}_blocks": blocks, f"{stem}_scales": scales, f"{stem}_bias": torch.zeros(3, 48)}
    stored = stored_tensors(tmp_path, arrays, {"quant_method": "mxfp4"})
    assert sorted(stored.names()) == [f"{stem}_bias", f"{stem}_blocks"]
    assert stored.shape(f"{stem}_blocks") == (3, 48, 64)
    for expert in range(3):
        for rows in (None, slice(0, 48, 2), slice(1, 48, 2)):
            matrix = stored.matrix(Source(f"{stem}_blocks", rows, expert=expert))
            equal(matrix, expected[expert].T[rows if rows is not None else slice(None)])
    with pytest.raises(CheckpointError, match="no expert 3"):
        stored.matrix(Source(f"{stem}_blocks", None, expert=3))
