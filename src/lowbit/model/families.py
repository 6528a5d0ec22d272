"""The families of decoders that lowbit runs, as data.

A family is one row of `FAMILIES`: which biases, norms, windows and activation its layers have, where its
config.json says so, and what an absent field means. A new family is a new row (and, if it brings a tensor
or an operation that no row has yet, a new line in `LAYER_TENSORS` and in the decoder).

Sources: the configuration and modeling files of transformers 4.4x to 5.x for each `model_type`; the
tests hold every row against them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.model.config import ModelConfig


@dataclass(frozen=True)
class Family:
    name: str  # `model_type` of config.json
    architectures: tuple[str, ...]  # class names that config.json may give
    attention_bias: str = "none"  # "none" | "qkv": always on q, k, v | "field": attention_bias, on q, k, v, o
    mlp_bias: str = "none"  # "none" | "field": mlp_bias, on gate, up and down
    qk_norm: bool = False  # RMS norm over each head of q and k, before the rotation
    sub_norm: bool = False  # RMS norm before the output projection and before the down projection
    window: str = "none"  # which layers have sliding_window: "none" | "all" | by layer_types, and where that
    # is absent "upper": layers from max_window_layers on | "no_rope": layers without rotation
    rope_layers: str = "all"  # "all" | "field": no_rope_layers / no_rope_layer_interval
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what an absent key of config.json means


_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        # Llama 1-3, SmolLM2, TinyLlama and everything else that uses the class.
        Family(
            name="llama",
            architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
            attention_bias="field",
            mlp_bias="field",
            defaults={**_COMMON, "max_position_embeddings": 2048},
        ),
        Family(
            name="mistral",
            architectures=("MistralForCausalLM",),
            window="all",
            defaults={
                **_COMMON,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
        ),
        Family(
            name="qwen2",
            architectures=("Qwen2ForCausalLM",),
            attention_bias="qkv",
            window="upper",
            defaults={
                **_COMMON,
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
        ),
        Family(
            name="qwen3",
            architectures=("Qwen3ForCausalLM",),
            attention_bias="field",
            qk_norm=True,
            window="upper",
            defaults={
                **_COMMON,
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
        ),
        Family(
            name="smollm3",
            architectures=("SmolLM3ForCausalLM",),
            attention_bias="field",
            mlp_bias="field",
            window="no_rope",
            rope_layers="field",
            defaults={
                **_COMMON,
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "rope_theta": 2000000.0,
                "tie_word_embeddings": True,
                "no_rope_layer_interval": 4,
            },
        ),
        # BitNet b1.58: the network around ternary weights; how weights are stored is the matrix's business.
        Family(
            name="bitnet",
            architectures=("BitNetForCausalLM",),
            attention_bias="field",
            sub_norm=True,
            defaults={
                **_COMMON,
                "hidden_act": "relu2",
                "max_position_embeddings": 2048,
                "num_key_value_heads": 5,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
            },
        ),
    )
}

# hidden_act of config.json -> activation of the decoder.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

# Keys of config.json that say nothing about the function from tokens to logits. (pretraining_tp asked old
# versions to sum in another order; published checkpoints still carry values above 1.)
# fmt: off
HARMLESS = frozenset({
    "architectures", "model_type", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "pad_token_id", "unk_token_id", "sep_token_id", "mask_token_id", "decoder_start_token_id",
    "initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout", "embd_pdrop",
    "resid_pdrop", "layerdrop", "layer_norm_eps", "attn_implementation", "pretraining_tp",
    "max_window_layers", "is_llama_config",
})
# fmt: on

# An unknown key with a word that begins like one of these may change the result: refused unless neutral.
SUSPECT = re.compile(
    "(?:^|[^a-z0-9])(?:scale|scaling|multiplier|softcap|logit|norm|layernorm|rmsnorm|bias|rope|rotary|nope"
    "|window|expert|moe|mla|lora|alibi|sink|adapter|head|layer|act|clip|attn|attention|parallel|residual"
    "|cross|vision|audio|encoder|nextn|mtp|quant|position|embed|tie|sparse|mixture|ssm|mamba|conv|gate|kv|qk)"
)


@dataclass(frozen=True)
class Tensor:
    name: str  # canonical name, without `model.layers.N.` where it belongs to a layer
    native: str  # its name in the native decoder
    shape: tuple[str, ...]  # symbols of `dimensions`
    present_if: str | None = None  # the ModelConfig field that says whether it exists; None: always


LAYER_TENSORS = (
    Tensor("input_layernorm.weight", "input_norm", ("hidden",)),
    Tensor("self_attn.q_proj.weight", "q", ("q", "hidden")),
    Tensor("self_attn.k_proj.weight", "k", ("kv", "hidden")),
    Tensor("self_attn.v_proj.weight", "v", ("kv", "hidden")),
    Tensor("self_attn.o_proj.weight", "o", ("hidden", "q")),
    Tensor("self_attn.q_proj.bias", "q_bias", ("q",), "qkv_bias"),
    Tensor("self_attn.k_proj.bias", "k_bias", ("kv",), "qkv_bias"),
    Tensor("self_attn.v_proj.bias", "v_bias", ("kv",), "qkv_bias"),
    Tensor("self_attn.o_proj.bias", "o_bias", ("hidden",), "o_bias"),
    Tensor("self_attn.q_norm.weight", "q_norm", ("head",), "qk_norm"),
    Tensor("self_attn.k_norm.weight", "k_norm", ("head",), "qk_norm"),
    Tensor("self_attn.attn_sub_norm.weight", "attn_sub_norm", ("q",), "sub_norm"),
    Tensor("post_attention_layernorm.weight", "post_norm", ("hidden",)),
    Tensor("mlp.gate_proj.weight", "gate", ("ffn", "hidden")),
    Tensor("mlp.up_proj.weight", "up", ("ffn", "hidden")),
    Tensor("mlp.down_proj.weight", "down", ("hidden", "ffn")),
    Tensor("mlp.gate_proj.bias", "gate_bias", ("ffn",), "mlp_bias"),
    Tensor("mlp.up_proj.bias", "up_bias", ("ffn",), "mlp_bias"),
    Tensor("mlp.down_proj.bias", "down_bias", ("hidden",), "mlp_bias"),
    Tensor("mlp.ffn_sub_norm.weight", "ffn_sub_norm", ("ffn",), "sub_norm"),
)

# The matrices of a block in the order of use; those of one group read the same input.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"

# Tensors that old checkpoints carry along and that the description already determines (fnmatch patterns).
IGNORABLE = (
    "model.layers.*.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.layers.*.self_attn.masked_bias",
)


@dataclass(frozen=True)
class Expected:
    """A tensor that a checkpoint of one network must hold."""

    name: str  # canonical
    native: str  # name in the native decoder
    shape: tuple[int, ...]


def expected_tensors(config: ModelConfig) -> list[Expected]:
    """Every tensor of the described network in the order of use; the head only where it is not tied."""
    sizes = {
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "q": config.n_heads * config.head_dim,
        "kv": config.n_kv_heads * config.head_dim,
        "head": config.head_dim,
    }
    vocabulary = (config.vocab_size, config.hidden_size)
    expected = [Expected(EMBEDDING, "embed", vocabulary)]
    for layer in range(config.n_layers):
        for tensor in LAYER_TENSORS:
            if tensor.present_if is None or getattr(config, tensor.present_if):
                shape = tuple(sizes[symbol] for symbol in tensor.shape)
                name = f"model.layers.{layer}.{tensor.name}"
                expected.append(Expected(name, f"layers.{layer}.{tensor.native}", shape))
    expected.append(Expected(FINAL_NORM, "norm", (config.hidden_size,)))
    if not config.tied:
        expected.append(Expected(HEAD, "head", vocabulary))
    return expected
