"""What a family of decoders is: the questions that its row answers, and how keys of config.json are read.

The rows are in families.py; config.py turns a row and a config.json into a ModelConfig.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Experts:
    """Layers of a family that have experts in place of an MLP."""

    count: int  # where neither num_experts nor num_local_experts says it
    per_token: int  # where num_experts_per_tok is absent
    size: str = "intermediate_size"  # the field with the intermediate size of an expert
    order: str = "softmax_topk"  # see ModelConfig
    renormalize: str = "always"  # "always" | "never" | "field": norm_topk_prob
    layers: str = "all"  # "all" | "steps": those that decoder_sparse_step and mlp_only_layers leave
    router_bias: bool = False


@dataclass(frozen=True)
class Family:
    name: str  # `model_type` of config.json
    architectures: tuple[str, ...]  # class names that config.json may give
    attention_bias: str = "none"  # "none" | "qkv": always on q, k, v | "field": attention_bias, on q, k, v, o
    # | "always": on all four
    mlp_bias: str = "none"  # "none" | "field": mlp_bias, on gate, up and down | "always"
    qk_norm: str = "none"  # RMS norm of q and k before the rotation: "none" | "head": each head | "whole"
    sub_norm: bool = False  # RMS norm before the output projection and before the down projection
    norm: str = "rms"  # "rms" | "layer": with biases
    norm_place: str = "pre"  # see ModelConfig, as for the next four
    norm_offset: float = 0.0
    gated: bool = True
    parallel: str = "none"  # "none" | "field": use_parallel_residual
    scaled_embedding: bool = False  # by the square root of hidden_size
    positions: str = "rope"  # "rope" | "learned"
    position_offset: int = 0
    rotary: str = "whole"  # "whole" heads | "partial": partial_rotary_factor of a head | "local": two
    # rotations, one for layers with a window
    window: str = "none"  # which layers have sliding_window: "none" | "all" | "switch": all, where
    # use_sliding_window is on | by layer_types, and where that is absent "upper": layers from
    # max_window_layers on | "no_rope": layers without rotation | "pattern": all but every
    # sliding_window_pattern-th
    rope_layers: str = "all"  # "all" | "field": no_rope_layers / no_rope_layer_interval
    attention_scale: str = "head_dim"  # ** -0.5 | "query_pre_attn_scalar", likewise | "field": as head_dim
    # unless scale_attn_weights is false
    softcaps: str = "none"  # "none" | "logits": final_logit_softcapping | "both": attn_logit_softcapping, too
    sinks: bool = False
    experts: Experts | None = None
    norm_eps: float = 0.0  # where the family has no field for it
    inner: int = 0  # intermediate_size where it is absent, in hidden_size; 0: it must be given
    activations: Mapping[str, str] = field(default_factory=dict)  # what differs from ACTIVATIONS
    names: Mapping[str, str] = field(default_factory=dict)  # our name of a field -> the family's
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what an absent key of config.json means
    fixed: Mapping[str, Any] = field(default_factory=dict)  # the only value of a key that runs, also absent
    unread: frozenset[str] = frozenset()  # keys that the class of transformers does not read either


# hidden_act of config.json -> activation of the decoder.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}

# Keys of config.json that say nothing about the function from tokens to logits. (pretraining_tp asked old
# versions to sum in another order; published checkpoints still carry values above 1.)
# fmt: off
HARMLESS = frozenset({
    "architectures", "model_type", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "pad_token_id", "unk_token_id", "sep_token_id", "mask_token_id", "decoder_start_token_id",
    "initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout", "embd_pdrop",
    "resid_pdrop", "layerdrop", "layer_norm_eps", "attn_implementation", "pretraining_tp",
    "max_window_layers", "is_llama_config", "attn_pdrop", "attention_probs_dropout_prob",
    "layer_norm_epsilon", "reorder_and_upcast_attn", "cache_implementation", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise",
})
# fmt: on

# An unknown key with a word that begins like one of these may change the result: refused unless neutral.
SUSPECT = re.compile(
    "(?:^|[^a-z0-9])(?:scale|scaling|multiplier|softcap|logit|norm|layernorm|rmsnorm|bias|rope|rotary|nope"
    "|window|expert|moe|mla|lora|alibi|sink|adapter|head|layer|act|clip|attn|attention|parallel|residual"
    "|cross|vision|audio|encoder|nextn|mtp|quant|position|embed|tie|sparse|mixture|ssm|mamba|conv|gate|kv|qk)"
)
