"""Models in the directories of other tools: their own code, or decoders written here from the published
layouts, give the numbers that we stored, and our readers read them back."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import lowbit
from lowbit.errors import CheckpointError, RequestError, UnsupportedError
from lowbit.interop.export import export
from lowbit.model.checkpoint import open_checkpoint

from ..model import tiny_models

TOKENS = tiny_models.token_ids(24)
LAYER = "model.layers.1.mlp.down_proj"
# Our format -> the targets that hold it exactly.
HELD = {
    "int4-g64": ["compressed-tensors", "gptq", "awq"],
    "int4a-g64": ["compressed-tensors", "gptq", "awq"],
    "int4-g128": ["compressed-tensors:int4-g32", "compressed-tensors:int8-g64", "gptq", "awq"],
    "int3-g64": ["compressed-tensors", "gptq"],
    "int5-g64": ["compressed-tensors"],
    "int6-g64": ["compressed-tensors"],
    "int7-g64": ["compressed-tensors"],
    "int2a-g64": ["compressed-tensors", "gptq"],
    "int8-row": ["compressed-tensors", "compressed-tensors:w8a8", "gptq"],
    "e4m3fn-row": ["compressed-tensors", "compressed-tensors:fp8"],
    "ternary": ["compressed-tensors"],
}
AGAINST = {"compressed-tensors": "compressed-tensors", "gptq": "layout", "awq": "layout"}
CASES = [
    pytest.param(
        format,
        target,
        marks=pytest.mark.interop(
            type=f"{target} {format}", direction="write", against=AGAINST[target.split(":")[0]]
        ),
    )
    for format, targets in HELD.items()
    for target in targets
]


@pytest.fixture(scope="module")
def model():
    """Layers 256 wide: every group size divides them."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    return tiny_models.build(tiny_models.CASES["llama"], **sizes)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    return tiny_models.save(model, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    """A function that gives the model in a format, quantized once."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(format):
        path = folder / format
        if not path.exists():
            lowbit.quantize(str(source), format, path, verify=False)
        return path

    return make


def fields(words: torch.Tensor, bits: int, count: int) -> np.ndarray:
    """Codes from int32 [n, words], bit by bit: slow, and written without our code."""
    data = np.ascontiguousarray(words.numpy()).view(np.uint8)
    flat = np.unpackbits(data, axis=1, bitorder="little")[:, : count * bits].reshape(len(data), count, bits)
    return (flat * (1 << np.arange(bits))).sum(axis=2)


def gptq_layer(tensors, bits, version):
    """W = scale (code - zero), by the layout in GPTQModel's documentation; [out, in]."""
    part = {name: tensors[f"{LAYER}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
    inputs, outputs = len(part["g_idx"]), part["scales"].shape[1]
    codes = fields(part["qweight"].T, bits, inputs)
    zeros = fields(part["qzeros"], bits, outputs) + (version == 1)
    group = part["g_idx"].numpy()
    return (part["scales"].float().numpy()[group] * (codes.T - zeros[group])).T.astype(np.float32)


def awq_layer(tensors):
    """By AutoAWQ's packing: nibble i of a word is the output ORDER[i] of eight."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def nibbles(words):
        found = np.zeros((len(words), 8 * words.shape[1]), np.int64)
        for i, place in enumerate(order):
            found[:, place::8] = (words.numpy().astype(np.int64) >> (4 * i)) & 15
        return found

    codes, zeros = nibbles(tensors[f"{LAYER}.qweight"]), nibbles(tensors[f"{LAYER}.qzeros"])
    scales = tensors[f"{LAYER}.scales"].float().numpy()
    size = len(codes) // len(zeros)
    return (np.repeat(scales, size, 0) * (codes - np.repeat(zeros, size, 0))).T.astype(np.float32)


def compressed_layer(folder, tensors):
    """By compressed-tensors' own decompressor, with the scheme that the config gives the layer."""
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    scheme = QuantizationScheme(**group)
    own = {name.removeprefix(LAYER + "."): t for name, t in tensors.items() if name.startswith(LAYER + ".")}
    own["weight_scale"] = own["weight_scale"].float()  # products of fp16 scales are rounded to fp16 otherwise
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    return compressor.decompress(own, scheme)["weight"].float().numpy()


@pytest.mark.parametrize(("format", "target"), CASES)
def test_what_fits_is_stored_exactly(format, target, quantized, tmp_path):
    report = export(quantized(format), target, tmp_path / "out")
    assert report["exact"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if target == "gptq":
        found = gptq_layer(tensors, config["bits"], 2 if config["checkpoint_format"] == "gptq_v2" else 1)
        assert config["checkpoint_format"] == ("gptq" if "a" not in format.split("-")[0] else "gptq_v2")
    elif target == "awq":
        found = awq_layer(tensors)
    else:
        found = compressed_layer(tmp_path / "out", tensors)
    with open_checkpoint(quantized(format)) as before, open_checkpoint(tmp_path / "out") as after:
        np.testing.assert_array_equal(found, before.read(LAYER + ".weight"))
        for name in before.names():  # and by our own readers
            np.testing.assert_array_equal(after.read(name), before.read(name), err_msg=name)


@pytest.mark.parametrize("format", ["int4-g64", "int4a-g64", "int3-g64", "int8-row", "e4m3fn-row"])
@pytest.mark.interop(type="compressed-tensors", direction="write", against="transformers")
def test_transformers_gives_our_logits(format, quantized, tmp_path):
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    pytest.importorskip("accelerate", reason="pip install accelerate")
    export(quantized(format), "compressed-tensors", tmp_path / "out")
    # Kept in codes, transformers 5.23 with compressed-tensors 0.20 expects zero-points unpacked; decoded in
    # loading, products are rounded to the type of the scales, fp16.
    zero_points = "a" in format.split("-")[0] and format.startswith("int")
    options = (
        {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if zero_points else {}
    )
    network = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", **options
    )
    found = tiny_models.logits(network, TOKENS)
    ours = reference_logits(quantized(format), tmp_path)
    share = 3e-3 if zero_points else 3e-4
    np.testing.assert_allclose(found, ours, atol=share * np.abs(ours).max(), rtol=0)


def reference_logits(path, tmp_path):
    """transformers on the very weights that we decode, in float32."""
    export(path, "safetensors:fp32", tmp_path / "plain", lossy=True)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, attn_implementation="eager"
    )
    return tiny_models.logits(network, TOKENS)


def test_transformers_opens_a_model_of_one_embedding(tmp_path):
    """Tied: the head is a Linear of which nothing is stored."""
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    network = tiny_models.build(tiny_models.CASES["llama-tied"], **sizes)
    source = tiny_models.save(network, tmp_path / "model")
    lowbit.quantize(str(source), "int4-g64", tmp_path / "q", verify=False)
    export(tmp_path / "q", "compressed-tensors", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    found, ours = tiny_models.logits(again, TOKENS), reference_logits(tmp_path / "q", tmp_path)
    np.testing.assert_allclose(found, ours, atol=3e-4 * np.abs(ours).max(), rtol=0)


@pytest.mark.interop(type="bitnet", direction="write", against="transformers")
def test_bitnet_is_unpacked_by_transformers(source, tmp_path):
    from transformers.integrations.bitnet import VALUES_PER_ITEM

    report = export(source, "bitnet", tmp_path / "out")
    assert not report["exact"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    packed, scale = tensors[LAYER + ".weight"], tensors[LAYER + ".weight_scale"]
    assert VALUES_PER_ITEM == 4
    codes = torch.cat([(packed >> (2 * i)) & 3 for i in range(4)])  # as unpack_weights, which compiles
    found = (codes.float() - 1) * scale
    with open_checkpoint(tmp_path / "out") as after, open_checkpoint(source) as before:
        np.testing.assert_array_equal(after.read(LAYER + ".weight"), found.numpy())
        weight = before.read(LAYER + ".weight")
    assert 0.3 < np.linalg.norm(found.numpy() - weight) / np.linalg.norm(weight) < 0.6  # what ternary loses
    again = export(tmp_path / "out", "bitnet", tmp_path / "again")
    assert again["exact"]
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize(
    "target", ["gptq", "gptq:int4a-g64", "awq", "compressed-tensors:w8a8", "compressed-tensors:fp8"]
)
def test_floats_are_rounded(target, source, tmp_path):
    export(source, target, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as after, open_checkpoint(source) as before:
        weight, found = before.read(LAYER + ".weight"), after.read(LAYER + ".weight")
        assert 0 < np.linalg.norm(found - weight) / np.linalg.norm(weight) < 0.13
        np.testing.assert_array_equal(after.read("lm_head.weight"), before.read("lm_head.weight"))
    again = export(tmp_path / "out", target, tmp_path / "again")
    assert again["exact"]


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
def test_plain_floats(kind, model, source, tmp_path):
    report = export(source, f"safetensors:{kind}", tmp_path / "out")
    assert report["exact"] == (kind == "fp32")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    for name, tensor in model.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor.to(wanted).float()), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_fused_layer_is_stored_whole(tmp_path):
    """Phi-3: queries, keys and values in one matrix, gate and up in another."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    network = tiny_models.build(tiny_models.CASES["phi3"], **sizes)
    source = tiny_models.save(network, tmp_path / "model")
    lowbit.quantize(str(source), "int4-g64", tmp_path / "q", verify=False)
    for target in ("compressed-tensors", "gptq", "awq"):
        assert export(tmp_path / "q", target, tmp_path / target)["exact"]
        with open_checkpoint(tmp_path / "q") as before, open_checkpoint(tmp_path / target) as after:
            for name in before.names():
                np.testing.assert_array_equal(after.read(name), before.read(name), err_msg=name)


def test_what_would_be_lost_is_said_and_needs_leave(quantized, tmp_path):
    words = r"21 matrices of nf4-g64 would be rounded to int4-g64: \d+\.\d% .*--lossy to accept that, or"
    with pytest.raises(UnsupportedError, match=words):
        export(quantized("nf4-g64"), "gptq:int4-g64", tmp_path / "out")
    with pytest.raises(UnsupportedError, match="21 matrices of ternary"):
        export(quantized("ternary"), "bitnet", tmp_path / "out")
    with pytest.raises(UnsupportedError, match="2 matrices of int6-g32 would be rounded to F16"):
        export(quantized("int4-g64"), "gptq", tmp_path / "out", embedding="fp16")
    assert not (tmp_path / "out").exists()
    report = export(quantized("nf4-g64"), "gptq:int4-g64", tmp_path / "out", lossy=True)
    rounded = [tensor for tensor in report["tensors"] if "proj" in tensor["name"]]
    assert all(not t["exact"] and 0.02 < t["relative_error"] < 0.2 for t in rounded)


def test_mixed_layers_are_each_stored_as_they_are(source, tmp_path):
    lowbit.quantize(
        str(source), "int4-g64", tmp_path / "q", layers={"*.down_proj.weight": "int8-g32"}, verify=False
    )
    assert export(tmp_path / "q", "compressed-tensors", tmp_path / "out")["exact"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    bits = {g["weights"]["num_bits"]: g["targets"] for g in config["config_groups"].values()}
    assert bits[8] == [f"model.layers.{n}.mlp.down_proj" for n in range(3)] and len(bits[4]) == 18
    assert config["ignore"] == ["lm_head"]
    with open_checkpoint(tmp_path / "q") as before, open_checkpoint(tmp_path / "out") as after:
        for name in before.names():
            np.testing.assert_array_equal(after.read(name), before.read(name), err_msg=name)
    assert export(tmp_path / "q", "gptq", tmp_path / "gptq")["exact"]  # all in 8 bits, groups of 32


def test_only_our_own_directories_are_replaced(source, tmp_path):
    export(source, "gptq", tmp_path / "out")
    with pytest.raises(CheckpointError, match="--force"):
        export(source, "awq", tmp_path / "out")
    export(source, "awq", tmp_path / "out", force=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        export(source, "awq", tmp_path / "other", force=True)
    with pytest.raises(CheckpointError, match="the model that is read"):
        export(source, "awq", source, force=True)


def test_an_error_leaves_nothing(source, tmp_path):
    def stop(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(source, "gptq", tmp_path / "in" / "out", progress=stop)
    assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("gptq:int5-g64", "choose int2, int3, int4, int8"),
        ("awq:int8-g64", "choose int4 with -g"),
        ("gptq:nf4-g64", "choose int2"),
        ("compressed-tensors:nf4-g64", "choose int2 .. int8"),
        ("bitnet:int4", "one format"),
        ("safetensors:int4", "choose fp16, bf16, fp32"),
    ],
)
def test_formats_that_are_not_written(target, words, source, tmp_path):
    with pytest.raises(RequestError, match=words):
        export(source, target, tmp_path / "out")
