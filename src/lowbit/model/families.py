"""The families of decoders that lowbit runs, as data.

A family is one row of `FAMILIES`: which biases, norms, windows and activation its layers have, where its
config.json says so, and what an absent field means. A new family is a new row (and, if it brings a tensor
or an operation that no row has yet, a new line in tensors.py and in the decoder).

Sources: the configuration and modeling files of transformers 4.4x to 5.x for each `model_type`; the
tests hold every row against them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


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
