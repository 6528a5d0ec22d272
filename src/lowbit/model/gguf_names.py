"""What GGUF files call things: architectures and their tensors, as tables that are read in both directions.

The tensors of an architecture are a stored_names.Names, so sources.py finds them in a file and plans how they
are written: llama.cpp's converter fuses matrices (Phi-3, GPT-2, GPT-NeoX), stacks experts, orders the rows of
queries and keys by rotated pairs (Llama), and adds 1 to Gemma's norms.
Source: gguf-py's constants (the tests hold every name against them) and llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowbit.model.stored_names import Names, Row

ROPE_FACTORS = "rope_freqs.weight"  # divisors of the rotation speeds (llama3 scaling)
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"  # longrope

# Stem in the file -> canonical stem.
GLOBAL_TENSORS = {
    "token_embd": "model.embed_tokens",
    "position_embd": "model.embed_positions",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "post_attention_norm": "post_self_attn_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "post_ffw_norm": "post_mlp_norm",
    "ffn_gate_inp": "mlp.router",
}
# Each expert apart is how the first files of Mixtral have them.
EXPERT_TENSORS = {
    f"mlp.experts.{{e}}.{part}_proj": (Row(f"ffn_{part}_exps", stacked=True), Row(f"ffn_{part}.{{e}}"))
    for part in ("gate", "up", "down")
}
_QKV = ("q", "k", "v")


def _names(changes: Mapping[str, tuple[Row, ...]] | None = None, permuted: bool = False) -> Names:
    """changes: stem -> where it lies instead."""
    inside: dict[str, tuple[Row, ...]] = {stem: (Row(name),) for name, stem in LAYER_TENSORS.items()}
    for part in _QKV:
        paired = " by pairs" if permuted and part != "v" else ""
        inside[f"self_attn.{part}_proj"] = (
            Row(f"attn_{part}", (part + paired) if paired else "all"),
            Row("attn_qkv", f"{part} of qkv{paired}"),
        )
    inside |= EXPERT_TENSORS
    inside |= changes or {}
    return Names(
        roots=("",),
        layer="blk.{n}.",
        around={stem: (name,) for name, stem in GLOBAL_TENSORS.items()},
        inside=inside,
        ignored=(ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS, "blk.*.attn_rot_embd.weight"),
        sinks="attn_sinks.weight",
        complete=True,
    )


_FUSED: dict[str, tuple[Row, ...]] = {
    f"self_attn.{part}_proj": (Row("attn_qkv", f"{part} of qkv"), Row(f"attn_{part}")) for part in _QKV
}
_PHI3 = {
    **_FUSED,
    "mlp.gate_proj": (Row("ffn_up", "first half"),),
    "mlp.up_proj": (Row("ffn_up", "second half"),),
}
# Its norm before the MLP has the name of other architectures' norm after attention.
_GPT_OSS: dict[str, tuple[Row, ...]] = {
    "post_attention_layernorm": (Row("post_attention_norm"), Row("ffn_norm")),
    "post_self_attn_norm": (),
}


@dataclass(frozen=True)
class Architecture:
    """general.architecture of a file.

    family: in transformers' words; experts: that of a file with experts, None: it has none
    names: of its tensors
    norm_shift: what the file adds to the weights of norms
    fields, scaling: keys of config.json, and of its rope_scaling, that the architecture fixes
    window_pattern: with a sliding window, every so-manieth layer sees everything; 0: a window is all layers'
    scale_of: layers of the one model whose attention is scaled by hidden / heads and not by head_dim
    """

    family: str
    names: Names
    experts: str | None = None
    norm_shift: float = 0.0
    fields: Mapping[str, Any] = field(default_factory=dict)
    scaling: Mapping[str, Any] = field(default_factory=dict)
    window_pattern: int = 0
    scale_of: int = 0

    @property
    def permuted(self) -> bool:
        """Are the rows of query and key heads stored in llama.cpp's order of rotated pairs?"""
        return self.names.inside["self_attn.q_proj"][0].part == "q by pairs"


_PAIRS, _PLAIN = _names(permuted=True), _names()
_TANH = {"hidden_act": "gelu_pytorch_tanh"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _PAIRS, experts="mixtral"),
    "qwen2": Architecture("qwen2", _PLAIN),
    "qwen3": Architecture("qwen3", _PLAIN),
    "qwen3moe": Architecture("qwen3_moe", _PLAIN, experts="qwen3_moe", fields={"norm_topk_prob": True}),
    "smollm3": Architecture("smollm3", _PAIRS, fields={"no_rope_layer_interval": 4}),
    "bitnet": Architecture("bitnet", _PLAIN, fields={"hidden_act": "silu"}),
    "gemma": Architecture("gemma", _PLAIN, norm_shift=1.0, fields=_TANH),
    "gemma2": Architecture("gemma2", _PLAIN, norm_shift=1.0, fields=_TANH, window_pattern=2, scale_of=46),
    "gemma3": Architecture(
        "gemma3_text", _PLAIN, norm_shift=1.0, fields=_TANH, window_pattern=6, scale_of=62
    ),
    "phi3": Architecture("phi3", _names(_PHI3)),
    "olmo2": Architecture("olmo2", _PLAIN),
    "olmoe": Architecture("olmoe", _PLAIN, experts="olmoe", fields={"norm_topk_prob": False}),
    "gpt2": Architecture("gpt2", _names(_FUSED), fields={"hidden_act": "gelu_new"}),
    "gptneox": Architecture("gpt_neox", _names(_FUSED), fields={"hidden_act": "gelu"}),
    "gpt-oss": Architecture(
        "gpt_oss",
        _names(_GPT_OSS),
        experts="gpt_oss",
        window_pattern=2,
        scaling={"truncate": False},  # as it was trained; llama.cpp rounds the ends of its ramp
    ),
}
# Family in transformers' words -> the architecture that holds it.
ARCHITECTURE_OF = {
    **{row.family: name for name, row in ARCHITECTURES.items()},
    **{row.experts: name for name, row in ARCHITECTURES.items() if row.experts},
    "mistral": "llama",
}


def is_shifted_norm(name: str) -> bool:
    """Is a tensor one of those to which norm_shift is added?"""
    return name.endswith("norm.weight")
