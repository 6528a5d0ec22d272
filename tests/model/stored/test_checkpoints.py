"""Whole quantized checkpoints run: the decoder's logits are transformers' with the decoded weights.

Every kind of storage under a Llama, and under Phi-3, whose queries, keys and values are one matrix.
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("lowbit._native")

from lowbit.errors import CheckpointError, UnsupportedError  # noqa: E402
from lowbit.model.checkpoint import open_checkpoint  # noqa: E402
from lowbit.model.loader import load_model  # noqa: E402
from lowbit.model.reference import reference_logits  # noqa: E402
from lowbit.model.sources import Source  # noqa: E402
from lowbit.model.stored.tensors import METHODS, StoredTensors  # noqa: E402
from lowbit.packed import TensorFile  # noqa: E402

from .. import tiny_models  # noqa: E402
from .test_fuzz_stored import KINDS, Arrays, safetensors, write  # noqa: E402


def float_array(tensor):
    return "F32", tuple(tensor.shape), tensor.numpy().astype("<f4").tobytes()


def quantized(model, kind, **changes):
    """(config.json, arrays) of the model with random matrices of this kind in its layers."""
    rng = np.random.default_rng(12)
    make, quantization = KINDS[kind]
    arrays: Arrays = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2 and "proj" in name:
            stem = name.removesuffix(".weight")
            arrays |= {f"{stem}.{part}": array for part, array in make(rng, *tensor.shape).items()}
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            arrays[name] = float_array(tensor)
    config = tiny_models.config_dict(model) | {"quantization_config": quantization | changes}
    return config, arrays


def decoded_into(model, folder):
    """Put what the matrices of a checkpoint decode to into the transformers model."""
    file = TensorFile(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    stored = StoredTensors(dict.fromkeys(file.names(), file), config, "config.json")
    state = model.state_dict()
    for name in stored.names():
        if stored.packed(name):
            state[name].copy_(torch.from_numpy(stored.matrix(Source(name)).dequantize()))
    return stored


def logits_of(folder, tokens):
    model = load_model(folder, activations="int16", kv_bits=16)
    cache = model.cache(len(tokens))
    found = model.decoder.logits(np.array(tokens, np.int32), [cache], [len(tokens)], all=True)
    return model, found


@pytest.mark.parametrize("case", ["llama-biases", "phi3"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_every_kind_runs(kind, case, tmp_path):
    if case not in tiny_models.CASES:
        case = next(name for name in tiny_models.CASES if "phi" in name)
    model = tiny_models.build(tiny_models.CASES[case])
    config, arrays = quantized(model, kind)
    folder = write(tmp_path / "model", config, safetensors(arrays))
    decoded_into(model, folder)
    tokens = tiny_models.token_ids(24)
    expected = tiny_models.logits(model, tokens)
    loaded, found = logits_of(folder, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * np.abs(expected).max())
    kinds = {term.kind for name, m in loaded.weights.items() if "proj" in name for term in m.terms}
    gathered = kind in ("gptq", "pack-quantized")  # both have act-order in KINDS
    assert kinds == ({"gathered"} if gathered else {"codes"})
    with open_checkpoint(folder) as checkpoint:
        name = "model.layers.0.mlp.gate_proj.weight"
        assert checkpoint.shape(name) == checkpoint.read(name).shape == checkpoint.matrix(name).shape
        assert checkpoint.dtype(name) not in ("F32", "I32", "U8")
        assert checkpoint.dtype("model.norm.weight") == "F32"


def test_matrices_that_were_left_out_stay_floats(tmp_path):
    model = tiny_models.build(tiny_models.CASES["llama"])
    config, arrays = quantized(model, "gptq", modules_to_not_convert=["down_proj"])
    floats = {name: t for name, t in model.state_dict().items() if name.endswith("down_proj.weight")}
    arrays = {n: a for n, a in arrays.items() if "down_proj" not in n}
    arrays |= {name: float_array(tensor) for name, tensor in floats.items()}
    folder = write(tmp_path / "model", config, safetensors(arrays))
    decoded_into(model, folder)
    tokens = tiny_models.token_ids(16)
    loaded, found = logits_of(folder, tokens)
    expected = tiny_models.logits(model, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * np.abs(expected).max())
    assert loaded.weights["model.layers.0.mlp.down_proj.weight"].terms[0].kind == "floats"


def test_biases_of_nothing_are_left_out_and_others_are_not(tmp_path):
    """AutoGPTQ writes a bias beside every matrix, zeros where the network has none."""
    model = tiny_models.build(tiny_models.CASES["llama"])
    config, arrays = quantized(model, "gptq")
    name = "model.layers.1.self_attn.q_proj.bias"
    folder = write(tmp_path / "model", config, safetensors(arrays | {name: float_array(torch.zeros(96))}))
    load_model(folder)
    write(tmp_path / "model", config, safetensors(arrays | {name: float_array(torch.ones(96))}))
    with pytest.raises(UnsupportedError, match="have no place"):
        load_model(folder)


def test_what_runs_otherwise_here_is_said(tmp_path):
    model = tiny_models.build(tiny_models.CASES["llama"])
    for kind, said in (("fp8", "stored for fp8; lowbit rounds them to int8"), ("llm.int8", "LLM.int8")):
        folder = write(
            tmp_path / kind,
            *(part if i == 0 else safetensors(part) for i, part in enumerate(quantized(model, kind))),
        )
        with open_checkpoint(folder) as checkpoint:
            assert said in " ".join(checkpoint.notes())
    folder = write(
        tmp_path / "gptq",
        *(part if i == 0 else safetensors(part) for i, part in enumerate(quantized(model, "gptq"))),
    )
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.notes() == []


def test_an_unknown_quantizer_is_named_with_those_that_are_read(tmp_path):
    model = tiny_models.build(tiny_models.CASES["llama"])
    config, arrays = quantized(model, "gptq", quant_method="aqlm")
    folder = write(tmp_path / "model", config, safetensors(arrays))
    with pytest.raises(UnsupportedError) as caught:
        open_checkpoint(folder)
    assert "'aqlm'" in str(caught.value) and all(name in str(caught.value) for name in METHODS)
    config, arrays = quantized(model, "gptq")
    name = "model.layers.0.mlp.up_proj.qweight"
    both = arrays | {name.replace("qweight", "weight"): float_array(torch.ones(4, 4))}
    with pytest.raises(CheckpointError, match="both quantized and plain"):
        open_checkpoint(write(tmp_path / "model", config, safetensors(both)))


def test_a_quantization_config_in_a_file_of_its_own(tmp_path):
    """As AutoGPTQ and AutoAWQ wrote before transformers knew them."""
    model = tiny_models.build(tiny_models.CASES["llama"])
    for kind, name in (("gptq", "quantize_config.json"), ("awq", "quant_config.json")):
        config, arrays = quantized(model, kind)
        own = config.pop("quantization_config")
        del own["quant_method"]
        if kind == "awq":
            own = {"w_bit": 4, "q_group_size": own["group_size"], "zero_point": True, "version": "GEMM"}
        folder = write(tmp_path / kind, config, safetensors(arrays))
        with pytest.raises(CheckpointError, match="qweight is stored quantized, but there is no"):
            load_model(folder)
        (folder / name).write_text(json.dumps(own))
        loaded = load_model(folder)
        assert loaded.weights["model.layers.0.mlp.up_proj.weight"].terms[0].kind != "floats"


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe", "olmoe"])
def test_experts_with_act_order_run(case, tmp_path):
    """Each expert gathers its inputs in an order of its own; chunks change nothing."""
    tiny_models.save(tiny_models.build(tiny_models.CASES[case]), tmp_path)
    file, rng = TensorFile(tmp_path / "model.safetensors"), np.random.default_rng(0)
    make, quantization = KINDS["gptq"]
    arrays: Arrays = {}
    for name in file.names():
        stem = name.removesuffix(".weight")
        if ".experts." in name or stem.endswith("_proj"):
            arrays |= {f"{stem}.{part}": array for part, array in make(rng, *file.shape(name)).items()}
        else:
            arrays[name] = (file.dtype(name), file.shape(name), file.array(name).tobytes())
    config = json.loads((tmp_path / "config.json").read_text())
    folder = write(tmp_path, config | {"quantization_config": quantization}, safetensors(arrays))
    tokens = tiny_models.token_ids(20)
    with open_checkpoint(folder) as checkpoint:
        weights = {name: checkpoint.read(name) for name in checkpoint.names()}
        expected = reference_logits(checkpoint.config, weights, tokens)
    model, found = logits_of(folder, tokens)
    # Keys and values of 16 bits shift the weights of experts, which these sharp networks enlarge.
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-2 * np.abs(expected).max())
    cache = model.cache(20)
    parts = [
        model.decoder.logits(np.array(part, np.int32), [cache], [len(part)], all=True)
        for part in (tokens[:1], tokens[1:14], tokens[14:])
    ]
    np.testing.assert_array_equal(np.concatenate(parts), found)
