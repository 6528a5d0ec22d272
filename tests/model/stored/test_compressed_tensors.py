"""Checkpoints of compressed-tensors decode to the numbers that the package itself decompresses."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors", reason="pip install --no-deps compressed-tensors loguru pydantic")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import dequantize  # noqa: E402

from lowbit.errors import CheckpointError, UnsupportedError  # noqa: E402

from .writing import equal, read_matrix, scales_of  # noqa: E402


def interop(kind, against="compressed-tensors"):
    return pytest.mark.interop(type=f"compressed-tensors {kind}", direction="read", against=against)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(11)


def settings(format, args, version="0.20.0", **more):
    """A quantization_config as config.json has it."""
    weights = args.model_dump(mode="json") if isinstance(args, QuantizationArgs) else args
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None} | more
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "version": version,
    }


def reference(format, arrays, args):
    compressor = BaseCompressor.get_value_from_registry(format)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return compressor.decompress(dict(arrays), scheme)["weight"]


# (The package cannot unpack 4-bit zero points of one word and several groups: 9 outputs at least.)
SHAPES = [(32, 128, 32), (48, 96, 96), (9, 320, 64), (33, 64, 16), (5, 96, -1), (7, 100, -1)]


def packed_integers(generator, bits, shape, symmetric, dtype=torch.float32):
    """(args, arrays) of a pack-quantized matrix with every code in it."""
    out, inputs, size = shape
    strategy = "channel" if size < 0 else "group"
    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size if size > 0 else None
    )
    half, groups = 1 << (bits - 1), 1 if size < 0 else inputs // size
    codes = torch.randint(-half, half, (out, inputs), generator=generator, dtype=torch.int8)
    arrays = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": scales_of(generator, out, groups, dtype=dtype),
        "weight_shape": torch.tensor([out, inputs]),
    }
    if not symmetric:
        zeros = torch.randint(-half, half, (out, groups), generator=generator, dtype=torch.int8)
        arrays["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
    return args, arrays


@interop("pack-quantized, 2 to 8 bits")
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_integers(bits, symmetric, generator, tmp_path):
    for shape in SHAPES:
        args, arrays = packed_integers(generator, bits, shape, symmetric)
        matrix = read_matrix(tmp_path, arrays, settings("pack-quantized", args))
        equal(matrix, reference("pack-quantized", arrays, args))


@interop("pack-quantized, 2 to 8 bits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_16_bits(dtype, generator, tmp_path):
    """The package multiplies in the type of the scales, which rounds our exact product once."""
    for symmetric in (True, False):
        args, arrays = packed_integers(generator, 4, (32, 128, 32), symmetric, dtype)
        matrix = read_matrix(tmp_path, arrays, settings("pack-quantized", args))
        exact = torch.from_numpy(matrix.dequantize())
        assert torch.equal(exact.to(dtype), reference("pack-quantized", arrays, args))
        wide = arrays | {"weight_scale": arrays["weight_scale"].float()}
        equal(matrix, reference("pack-quantized", wide, args))


def pack_padded(codes, bits):
    """int32 words of 32 // bits whole codes, as compressed-tensors packed before 0.18."""
    factor = 32 // bits
    rows, count = codes.shape
    words = torch.zeros(rows, math.ceil(count / factor), dtype=torch.int64)
    for i in range(count):
        words[:, i // factor] |= (codes[:, i].long() + (1 << (bits - 1))) << (bits * (i % factor))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@interop("pack-quantized with gaps, 3 5 6 7 bits", "its layout before 0.18, written in torch")
@pytest.mark.parametrize("bits", range(2, 9))
def test_packings_of_old_versions(bits, generator, tmp_path):
    for out, inputs, size in SHAPES:
        args, arrays = packed_integers(generator, bits, (out, inputs, size), False)
        half = 1 << (bits - 1)
        codes = torch.randint(-half, half, (out, inputs), generator=generator, dtype=torch.int8)
        zeros = torch.randint(
            -half, half, arrays["weight_scale"].shape, generator=generator, dtype=torch.int8
        )
        old = arrays | {
            "weight_packed": pack_padded(codes, bits),
            "weight_zero_point": pack_padded(zeros.T, bits).T,
        }
        matrix = read_matrix(tmp_path, old, settings("pack-quantized", args, "0.13.0"))
        equal(matrix, dequantize(codes, arrays["weight_scale"], zeros, args))


def test_words_that_fit_both_packings_need_the_version(generator, tmp_path):
    args, arrays = packed_integers(generator, 3, (4, 20, -1), True)
    with pytest.raises(UnsupportedError, match="with or without gaps"):
        read_matrix(tmp_path, arrays, settings("pack-quantized", args, None))
    equal(
        read_matrix(tmp_path, arrays, settings("pack-quantized", args)),
        reference("pack-quantized", arrays, args),
    )


@interop("int-quantized")
@pytest.mark.parametrize("strategy", ["channel", "group", "tensor", "block"])
def test_int_quantized(strategy, generator, tmp_path):
    shapes = {"channel": (24, 1), "group": (24, 2), "tensor": (1,), "block": (2, 2)}
    args = QuantizationArgs(
        num_bits=8,
        strategy=strategy,
        group_size=48 if strategy == "group" else None,
        block_structure=[16, 48] if strategy == "block" else None,
    )
    arrays = {
        "weight": torch.randint(-128, 128, (24, 96), generator=generator, dtype=torch.int8),
        "weight_scale": scales_of(generator, *shapes[strategy]) + (strategy == "tensor") * 0.5,
    }
    if strategy == "channel":
        arrays["input_scale"] = torch.ones(1)  # static activations: not used
    expected = reference("int-quantized", {k: v for k, v in arrays.items() if k != "input_scale"}, args)
    equal(read_matrix(tmp_path, arrays, settings("int-quantized", args)), expected)
    if strategy in ("channel", "group"):
        args = args.model_copy(update={"symmetric": False})
        zeros = torch.randint(-128, 128, shapes[strategy], generator=generator, dtype=torch.int8)
        arrays = {k: v for k, v in arrays.items() if k != "input_scale"} | {"weight_zero_point": zeros}
        equal(
            read_matrix(tmp_path, arrays, settings("int-quantized", args)),
            reference("int-quantized", arrays, args),
        )


def every_fp8(generator, out, inputs):
    codes = torch.randint(0, 256, (out, inputs), generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x08
    return codes.view(torch.float8_e4m3fn)


@interop("float-quantized")
@pytest.mark.parametrize("strategy", ["channel", "group", "tensor", "block"])
def test_float_quantized(strategy, generator, tmp_path):
    shapes = {"channel": (40, 1), "group": (40, 3), "tensor": (1,), "block": (3, 3)}
    args = QuantizationArgs(
        num_bits=8,
        type="float",
        strategy=strategy,
        group_size=64 if strategy == "group" else None,
        block_structure=[16, 64] if strategy == "block" else None,
    )
    inputs = 150 if strategy == "block" else 192  # the last block is not whole
    arrays = {
        "weight": every_fp8(generator, 40, inputs),
        "weight_scale": scales_of(generator, *shapes[strategy]) + (strategy == "tensor") * 0.5,
    }
    matrix = read_matrix(tmp_path, arrays, settings("float-quantized", args))
    equal(matrix, reference("float-quantized", arrays, args))


@interop("nvfp4-pack-quantized")
def test_nvfp4(generator, tmp_path):
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    codes = torch.randint(0, 256, (33, 48), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 0x7F, (33, 6), generator=generator, dtype=torch.uint8)
    scales[0, 0], scales[0, 1] = 0, 1  # zero and the smallest
    for divisor in (2688.0 / 3.7, 1.0, 1e-6):
        arrays = {
            "weight_packed": codes,
            "weight_scale": scales.view(torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([divisor]),
        }
        matrix = read_matrix(tmp_path, arrays, settings("nvfp4-pack-quantized", args))
        assert matrix.bits_per_weight < 4.5 * 64 / 33 + 0.2  # 33 rows are stored as 64
        exact = torch.from_numpy(matrix.dequantize())
        assert torch.equal(exact.bfloat16(), reference("nvfp4-pack-quantized", arrays, args))
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

        unpacked = unpack_fp4_from_uint8(codes, 33, 96, torch.float32)
        wide = scales.view(torch.float8_e4m3fn).float()
        equal(matrix, dequantize(unpacked, wide, None, args, torch.float32, torch.tensor([divisor])))


@interop("mxfp4-pack-quantized")
def test_mxfp4(generator, tmp_path):
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    arrays = {
        "weight_packed": torch.randint(0, 256, (40, 48), generator=generator, dtype=torch.uint8),
        "weight_scale": torch.randint(3, 250, (40, 3), generator=generator, dtype=torch.uint8),
    }
    equal(
        read_matrix(tmp_path, arrays, settings("mxfp4-pack-quantized", args)),
        reference("mxfp4-pack-quantized", arrays, args),
    )


@interop("mxfp6-pack-quantized and mxfp8-quantized")
def test_mxfp6_and_mxfp8(generator, tmp_path):
    args = QuantizationArgs(
        num_bits=6, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    scales = torch.randint(3, 245, (40, 3), generator=generator, dtype=torch.uint8)
    arrays = {
        "weight_packed": torch.randint(0, 256, (40, 72), generator=generator, dtype=torch.uint8),
        "weight_scale": scales,
    }
    matrix = read_matrix(tmp_path, arrays, settings("mxfp6-pack-quantized", args))
    equal(matrix, reference("mxfp6-pack-quantized", arrays, args))
    args = QuantizationArgs(
        num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    arrays = {"weight": every_fp8(generator, 40, 96), "weight_scale": scales.clamp(20, 230)}
    matrix = read_matrix(tmp_path, arrays, settings("mxfp8-quantized", args))
    exact = torch.from_numpy(matrix.dequantize())
    assert torch.equal(exact.bfloat16(), reference("mxfp8-quantized", arrays, args))


@interop("pack-quantized with act-order (g_idx)", "its decompression before 0.20, written in torch")
def test_group_indices_of_old_versions(generator, tmp_path):
    args, arrays = packed_integers(generator, 4, (40, 128, 32), False)
    perm = torch.randperm(128, generator=generator)
    groups = torch.empty(128, dtype=torch.int32)
    groups[perm] = torch.arange(128, dtype=torch.int32) // 32
    # Decompression ordered the columns by group, dequantized, and put them back.
    order = torch.argsort(groups.long(), stable=True)
    codes = torch.randint(-8, 8, (40, 128), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-8, 8, (40, 4), generator=generator, dtype=torch.int8)
    arrays |= {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_zero_point": pack_to_int32(zeros, 4, packed_dim=0),
        "weight_g_idx": groups,
    }
    expected = torch.empty(40, 128)
    expected[:, order] = dequantize(codes[:, order], arrays["weight_scale"], zeros, args)
    matrix = read_matrix(tmp_path, arrays, settings("pack-quantized", args, "0.12.0"))
    assert matrix.terms[0].kind == "gathered"
    equal(matrix, expected)
    for bad in (-1, 4, 1 << 30):
        hostile = groups.clone()
        hostile[17] = bad
        with pytest.raises(CheckpointError, match="weight_g_idx has groups"):
            read_matrix(tmp_path, arrays | {"weight_g_idx": hostile}, settings("pack-quantized", args))


def test_more_exact_targets_go_first(generator, tmp_path):
    """A name, then a pattern, then a class."""
    few, many = (
        QuantizationArgs(num_bits=4, strategy="channel"),
        QuantizationArgs(num_bits=8, strategy="channel"),
    )
    config = settings("pack-quantized", few)
    config["config_groups"]["group_1"] = {
        "targets": ["re:.*up_proj"],
        "weights": many.model_dump(mode="json"),
    }
    _, arrays = packed_integers(generator, 8, (8, 64, -1), True)
    equal(read_matrix(tmp_path, arrays, config), reference("pack-quantized", arrays, many))
    _, arrays = packed_integers(generator, 4, (8, 64, -1), True)
    config["config_groups"]["group_0"]["targets"] = ["model.layers.0.mlp.up_proj"]
    equal(read_matrix(tmp_path, arrays, config), reference("pack-quantized", arrays, few))


REFUSED = {
    "quantization_status='frozen'": {"quantization_status": "frozen"},
    "format='marlin-24'": {"format": "marlin-24"},
    "sparsity_config": {"sparsity_config": {"format": "sparse-24-bitmask"}},
    "transform_config": {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
    "could take very long": {"targets": ["re:(a+)+b"]},
    "no regular expression": {"targets": ["re:(("]},
    "num_bits=9": {"num_bits": 9},
    "strategy='token'": {"strategy": "token"},
    "type 'complex'": {"type": "complex"},
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_is_not_known_is_refused_by_name(named, generator, tmp_path):
    args, arrays = packed_integers(generator, 4, (8, 64, -1), True)
    config = settings("pack-quantized", args)
    for key, value in REFUSED[named].items():
        place = config if key in config or "config" in key else config["config_groups"]["group_0"]
        place = place if key in place or "config" in key else place["weights"]
        place[key] = value
    with pytest.raises(UnsupportedError) as caught:
        read_matrix(tmp_path, arrays, config)
    assert named in str(caught.value) and "lowbit" in str(caught.value)


def test_the_test_sees_a_flipped_bit(generator, tmp_path):
    args, arrays = packed_integers(generator, 3, (8, 64, 16), False)
    expected = reference("pack-quantized", arrays, args).numpy()
    for name in ("weight_packed", "weight_zero_point"):
        flipped = arrays[name].clone()
        flipped.reshape(-1)[-1] ^= 1 << 20
        matrix = read_matrix(tmp_path, arrays | {name: flipped}, settings("pack-quantized", args))
        assert not np.array_equal(matrix.dequantize(), expected)
