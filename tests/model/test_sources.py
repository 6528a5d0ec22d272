"""Stored names of every family: what transformers saves is found, and assembled again to the bit."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from lowbit.errors import CheckpointError
from lowbit.model.sources import Source, sources, stored_tensors

torch.set_num_threads(1)

SIZES = {
    "vocab_size": 70,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": None,
}
GPT2 = {"vocab_size": 70, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 6}
OPT = {**SIZES, "ffn_dim": 40, "word_embed_proj_dim": 24}
del OPT["num_key_value_heads"]

# model_type -> (class in transformers, settings)
MODELS = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 8}),
    "gemma3_text": ("Gemma3ForCausalLM", {"head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "opt": ("OPTForCausalLM", OPT),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 3}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 3, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}),
}
MATRICES = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|mlp\.router"
    r"|mlp\.experts\.\d+\.(gate|up|down)_proj)\.(weight|bias)"
)


def make(kind: str, folder: Path) -> tuple[transformers.PreTrainedModel, SimpleNamespace]:
    name, settings = MODELS[kind]
    model_class = getattr(transformers, name)
    sizes = settings if settings in (GPT2, OPT) else {**SIZES, **settings}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    config = model.config
    sparse = kind in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
    described = SimpleNamespace(
        family=kind,
        n_layers=2,
        n_heads=6,
        n_kv_heads=6 if kind in ("gpt2", "opt", "gpt_neox") else 2,
        head_dim=getattr(config, "head_dim", None) or 4,
        hidden_size=24,
        intermediate_size=96 if kind == "gpt2" else 40,
        n_experts=3 if sparse else 0,
        expert_size=16 if kind == "qwen3_moe" else 40,
    )
    return model, described


@pytest.mark.parametrize("kind", MODELS)
def test_saved_tensors_are_found_and_assembled_again(kind, tmp_path):
    _, config = make(kind, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    found = sources(config, stored)
    canonical = {name: source.view(stored[source.stored]) for name, source in found.items()}
    for name, source in found.items():
        assert canonical[name].shape == source.shape(stored[source.stored].shape), name
        known = MATRICES.fullmatch(name) or "norm" in name or name.endswith("self_attn.sinks")
        assert known or name in (
            "model.embed_tokens.weight",
            "model.embed_positions.weight",
            "lm_head.weight",
        )
    layer = [name for name in canonical if name.startswith("model.layers.0.")]
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"} <= set(layer)

    again = stored_tensors(config, {name: array.shape for name, array in canonical.items()})
    assert again.keys() == stored.keys()
    for name, plan in again.items():
        array = plan.assemble(canonical.__getitem__)
        assert plan.shape == stored[name].shape
        assert np.array_equal(array, stored[name]), name
        assert (plan.whole is None) == (
            len(plan.parts) > 1 or name.endswith("c_proj.weight") or "c_fc.weight" in name
        )


def products(kind: str, model: transformers.PreTrainedModel, layer: int, x: torch.Tensor) -> dict:
    """What the modules of one layer give for x by the names of our matrices, split as transformers does."""
    if kind == "phi3":
        block = model.model.layers[layer]
        q, k, v = block.self_attn.qkv_proj(x).split([24, 8, 8], dim=-1)
        gate, up = block.mlp.gate_up_proj(x).chunk(2, dim=-1)
        return {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v} | {
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
        }
    if kind == "gpt2":
        block = model.transformer.h[layer]
        q, k, v = block.attn.c_attn(x).split(24, dim=-1)
        return {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v} | {
            "self_attn.o_proj": block.attn.c_proj(x),
            "mlp.up_proj": block.mlp.c_fc(x),
        }
    assert kind == "gpt_neox"
    attention = model.gpt_neox.layers[layer].attention
    mixed = attention.query_key_value(x).view(*x.shape[:-1], -1, 3 * attention.head_size)
    q, k, v = (part.flatten(-2) for part in mixed.chunk(3, dim=-1))
    return {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}


@pytest.mark.parametrize("kind", ["phi3", "gpt2", "gpt_neox"])
def test_parts_of_fused_matrices_multiply_as_transformers_does(kind, tmp_path):
    model, config = make(kind, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    found = sources(config, stored)
    x = torch.randn(5, 24)
    for layer in range(2):
        with torch.no_grad():
            wanted = products(kind, model, layer, x)
        for name, value in wanted.items():
            at = f"model.layers.{layer}.{name}"
            source = found[f"{at}.weight"]
            product = x.numpy() @ source.view(stored[source.stored]).T
            if f"{at}.bias" in found:
                bias = found[f"{at}.bias"]
                product = product + bias.view(stored[bias.stored])
            np.testing.assert_allclose(product, value.numpy(), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_experts_are_those_of_the_modules(kind, tmp_path):
    model, config = make(kind, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    found = sources(config, stored)
    for name, parameter in model.state_dict().items():
        match = re.fullmatch(r"model\.layers\.(\d)\.mlp\.experts\.(gate_up|down)_proj(_bias)?", name)
        if match is None:
            continue
        suffix = "bias" if match[3] else "weight"
        for expert in range(3):
            wanted = parameter[expert].numpy()
            if kind == "gpt_oss":
                wanted = wanted.T  # [in, out] there; a vector stays as it is
                parts = {"gate": wanted[::2], "up": wanted[1::2]}
            else:
                half = len(wanted) // 2
                parts = {"gate": wanted[:half], "up": wanted[half:]}
            if match[2] == "down":
                parts = {"down": wanted}
            for part, value in parts.items():
                source = found[f"model.layers.{match[1]}.mlp.experts.{expert}.{part}_proj.{suffix}"]
                assert np.array_equal(source.view(stored[source.stored]), value)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_that_were_saved_as_one_array_are_found(kind, tmp_path):
    model, config = make(kind, tmp_path)
    stored = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    apart = load_file(tmp_path / "model.safetensors")
    one, many = sources(config, stored), sources(config, apart)
    assert one.keys() == many.keys()
    for name, source in one.items():
        assert np.array_equal(
            source.view(stored[source.stored]), many[name].view(apart[many[name].stored])
        ), name


def test_mxfp4_experts_point_at_their_blocks():
    config = SimpleNamespace(
        family="gpt_oss", n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, intermediate_size=8,
        n_experts=2, expert_size=8,
    )  # fmt: skip
    at = "model.layers.0.mlp.experts."
    names = [
        f"{at}{name}_{suffix}"
        for name in ("gate_up_proj", "down_proj")
        for suffix in ("blocks", "scales", "bias")
    ]
    found = sources(config, ["model.embed_tokens.weight", *names])
    assert len(found) == 1 + 2 * 3 * 2
    up = found[f"{at}1.up_proj.weight"]
    assert (up.stored, up.rows, up.transposed, up.expert) == (
        f"{at}gate_up_proj_blocks",
        slice(1, 16, 2),
        False,
        1,
    )
    assert up.shape((2, 16, 1, 16)) == (8, 1, 16)
    assert found[f"{at}0.down_proj.bias"].stored == f"{at}down_proj_bias"


def llama(**changes):
    sizes = {"n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 4, "intermediate_size": 8}
    return SimpleNamespace(**{"family": "llama", "n_experts": 0, "expert_size": 0, **sizes, **changes})


def test_models_that_were_saved_without_a_head_lack_the_root():
    assert sources(
        llama(), ["embed_tokens.weight", "layers.0.input_layernorm.weight", "norm.weight"]
    ).keys() == {
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
    }
    found = sources(llama(family="gpt2"), ["wte.weight", "h.0.attn.c_attn.weight", "h.0.attn.bias"])
    assert "model.layers.0.self_attn.k_proj.weight" in found
    assert not any("attn.bias" in name for name in found)  # the causal mask of old files
    assert "model.norm.weight" in sources(
        llama(family="opt"), ["decoder.embed_tokens.weight", "decoder.final_layer_norm.weight"]
    )


def test_unknown_tensors_keep_their_names_and_two_conventions_are_refused():
    found = sources(llama(), ["model.embed_tokens.weight", "model.layers.0.adapter.weight"])
    assert found["model.layers.0.adapter.weight"].whole
    mixed = ["transformer.wte.weight", "model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match="two conventions"):
        sources(llama(family="gpt2"), mixed)


def test_writing_refuses_what_has_no_place_or_is_incomplete():
    with pytest.raises(CheckpointError, match="no place"):
        stored_tensors(llama(), {"model.layers.0.adapter.weight": (4, 4)})
    only = {"model.layers.0.mlp.gate_proj.weight": (8, 8)}
    assert stored_tensors(llama(), only)["model.layers.0.mlp.gate_proj.weight"].whole
    with pytest.raises(CheckpointError, match="needs more than"):
        stored_tensors(
            llama(n_experts=2, expert_size=8, family="gpt_oss"),
            {"model.layers.0.mlp.experts.0.down_proj.weight": (8, 8)},
        )


def test_a_source_tells_a_shape_that_cannot_be():
    assert Source("x", expert=3).shape((2, 4)) == ()
    assert Source("x", rows=slice(0, 8)).shape((4, 2)) == (4, 2)  # too few rows: the checkpoint is refused
    assert Source("x", rows=np.arange(8)).shape((4, 2)) == (4, 2)
