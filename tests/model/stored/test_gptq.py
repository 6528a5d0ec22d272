"""GPTQ checkpoints decode to GPTQModel's numbers; act-order is exact, gathered."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lowbit.errors import CheckpointError, UnsupportedError  # noqa: E402
from lowbit.kernels import matmul  # noqa: E402

from .writing import equal, read_matrix, scales_of  # noqa: E402

LAYOUT = "the documented layout, written in torch"


def settings(bits, group_size, version=2, **more):
    stored = {1: "gptq", 2: "gptq_v2"}[version]
    found = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "checkpoint_format": stored}
    return found | {"desc_act": False, "sym": False, "lm_head": False, "pack_dtype": "int32"} | more


def words(generator, *shape):
    return torch.randint(-(1 << 31), (1 << 31) - 1, shape, generator=generator, dtype=torch.int64).to(
        torch.int32
    )


def random_arrays(bits, shape, desc_act=False, seed=5, dtype=torch.float16):
    """Arrays of random bits: every code and zero point occurs."""
    out, inputs, size = shape
    generator = torch.Generator().manual_seed(seed + bits)
    size = inputs if size < 0 else size
    groups = -(-inputs // size)
    g_idx = torch.arange(inputs, dtype=torch.int32) // size
    if desc_act:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    return {
        "qweight": words(generator, inputs * bits // 32, out),
        "qzeros": words(generator, groups, out * bits // 32),
        "scales": scales_of(generator, groups, out, dtype=dtype),
        "g_idx": g_idx,
    }


def field(words, index, bits):
    """Field `index` along the first dimension: bits run on from one word into the next."""
    bit = index * bits
    value = words[bit // 32].long() & 0xFFFFFFFF
    if bit // 32 + 1 < len(words):
        value |= (words[bit // 32 + 1].long() & 0xFFFFFFFF) << 32
    return (value >> (bit % 32)) & ((1 << bits) - 1)


def decode(arrays, bits, version):
    """float32 [out, in], from the layout alone."""
    inputs, (_, out) = len(arrays["g_idx"]), arrays["scales"].shape
    codes = torch.stack([field(arrays["qweight"], i, bits) for i in range(inputs)])
    zeros = torch.stack([field(arrays["qzeros"].T, o, bits) for o in range(out)]).T
    if version == 1:
        zeros = zeros + 1
    g_idx = arrays["g_idx"].long()
    return (arrays["scales"].float()[g_idx] * (codes - zeros[g_idx])).T


# out, in, group size: 32 outputs and inputs fill whole words of every width
SHAPES = [(32, 128, 32), (64, 96, -1), (32, 160, 64), (96, 256, 256), (32, 224, 128)]


@pytest.mark.interop(
    type="GPTQ v2, 2 3 4 8 bits, with and without act-order", direction="read", against=LAYOUT
)
@pytest.mark.parametrize("desc_act", [False, True], ids=["", "act-order"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_documented_layout(bits, desc_act, tmp_path):
    for shape in SHAPES:
        arrays = random_arrays(bits, shape, desc_act)
        matrix = read_matrix(tmp_path, arrays, settings(bits, shape[2], desc_act=desc_act))
        equal(matrix, decode(arrays, bits, 2))
        assert (matrix.terms[0].kind == "gathered") == (
            shape[1] % shape[2] != 0
            if shape[2] > 0 and not desc_act
            else desc_act and 0 < shape[2] < shape[1]
        )


@pytest.mark.interop(type="GPTQ v1 and v2, 2 3 4 8 bits, act-order", direction="read", against="gptqmodel")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel(bits, version, tmp_path):
    """Its own module dequantizes, after its own conversion of version 1: words overflow alike."""
    qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="pip install gptqmodel")
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    for shape in SHAPES:
        for desc_act in (False, True):
            out, inputs, size = shape
            arrays = random_arrays(bits, shape, desc_act)
            module = qlinear.TorchLinear(
                bits=bits, group_size=size, sym=False, desc_act=desc_act,
                in_features=inputs, out_features=out,
                register_buffers=True,
            )  # fmt: skip
            for name, tensor in arrays.items():
                getattr(module, name).data = tensor.clone()
            module.scales.data = module.scales.data.float()
            if version == 1:
                convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
            expected = module.dequantize_weight().T
            matrix = read_matrix(tmp_path, arrays, settings(bits, size, version, desc_act=desc_act))
            equal(matrix, expected)


@pytest.mark.interop(type="GPTQ v1", direction="read", against=LAYOUT)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_1_adds_the_one_that_its_writer_took_away(bits, tmp_path):
    shape = (32, 128, 32)
    arrays = random_arrays(bits, shape)
    zeros = torch.randint(1, 1 << bits, (4, 32), generator=torch.Generator().manual_seed(bits))
    packed = torch.zeros(4, bits, dtype=torch.int64)
    for o in range(32):
        value = (zeros[:, o] - 1) << (o * bits % 32)
        packed[:, o * bits // 32] |= value & 0xFFFFFFFF
        if o * bits % 32 + bits > 32:
            packed[:, o * bits // 32 + 1] |= value >> 32
    arrays["qzeros"] = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    equal(read_matrix(tmp_path, arrays, settings(bits, 32, 1)), decode(arrays, bits, 1))


def test_a_symmetric_matrix_needs_no_zero_points(tmp_path):
    arrays = random_arrays(4, (32, 128, 32))
    arrays["qzeros"] = torch.full((4, 4), 0x77777777, dtype=torch.int32)
    matrix = read_matrix(tmp_path, arrays, settings(4, 32, 1, sym=True))
    assert matrix.format_name == "int4-g32" and matrix.terms[0].zero_points is None
    assert matrix.bits_per_weight < 4.7
    equal(matrix, decode(arrays, 4, 1))


def test_scales_of_other_types_stay_what_they_are(tmp_path):
    for dtype, kind in ((torch.bfloat16, "fp32"), (torch.float32, "fp32"), (torch.float16, "fp16")):
        arrays = random_arrays(4, (32, 128, 32), dtype=dtype)
        matrix = read_matrix(tmp_path, arrays, settings(4, 32))
        assert matrix.terms[0].scale_type == kind  # the extreme ones of scales_of do not fit float16
        equal(matrix, decode(arrays, 4, 2))
    arrays["scales"] = arrays["scales"].clamp(0.01, 0.1).bfloat16()
    assert read_matrix(tmp_path, arrays, settings(4, 32)).terms[0].scale_type == "fp16"


def test_act_order_multiplies_like_the_same_matrix_in_order(tmp_path):
    """A checkpoint without act-order whose inputs are sorted otherwise is one with it."""
    plain = random_arrays(4, (64, 256, 32))
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    codes = torch.stack([field(plain["qweight"], i, 4) for i in range(256)])[order]
    packed = sum((codes[i::8] << (4 * i)) for i in range(8))
    moved = plain | {
        "qweight": torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32),
        "g_idx": plain["g_idx"][order],
    }
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(2)).numpy()
    one = read_matrix(tmp_path, plain, settings(4, 32))
    other = read_matrix(tmp_path, moved, settings(4, 32, desc_act=True))
    np.testing.assert_array_equal(one.dequantize()[:, order], other.dequantize())
    # Within a group the inputs may stand in another order, which changes no integer sum and no rounding step.
    np.testing.assert_allclose(matmul(x[:, order], other), matmul(x, one), rtol=2e-6, atol=1e-5)


def test_matrices_of_other_widths_are_told_by_their_shapes(tmp_path):
    arrays = random_arrays(8, (32, 128, 64))
    config = settings(4, 32, dynamic={"+:.*up_proj.*": {"bits": 8, "group_size": 64}})
    equal(read_matrix(tmp_path, arrays, config), decode(arrays, 8, 2))


@pytest.mark.parametrize("bad", [-1, 4, 1 << 30, -(1 << 31)])
def test_hostile_group_indices_are_refused(bad, tmp_path):
    arrays = random_arrays(4, (32, 128, 32), desc_act=True)
    arrays["g_idx"][77] = bad
    with pytest.raises(CheckpointError, match="g_idx has groups"):
        read_matrix(tmp_path, arrays, settings(4, 32))


def test_all_inputs_in_one_of_many_groups_take_no_more_memory(tmp_path):
    arrays = random_arrays(4, (32, 128, 16))
    arrays["g_idx"][:] = 3
    matrix = read_matrix(tmp_path, arrays, settings(4, 16))
    equal(matrix, decode(arrays, 4, 2))
    arrays["g_idx"][:100], arrays["g_idx"][100:] = 3, torch.arange(28, dtype=torch.int32) % 8
    matrix = read_matrix(tmp_path, arrays, settings(4, 16))
    equal(matrix, decode(arrays, 4, 2))
    assert len(matrix.terms[0].inputs) <= 128 + 8 * 16


REFUSED = {
    "checkpoint_format='marlin'": {"checkpoint_format": "marlin"},
    "bits=5": {"bits": 5},
    "pack_dtype='int64'": {"pack_dtype": "int64"},
    "rotation='hadamard'": {"rotation": "hadamard"},
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_is_not_known_is_refused_by_name(named, tmp_path):
    with pytest.raises(UnsupportedError, match="lowbit reads") as caught:
        read_matrix(tmp_path, random_arrays(4, (32, 128, 32)), settings(4, 32) | REFUSED[named])
    assert named in str(caught.value)
