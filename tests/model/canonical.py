"""Parameters of transformers' models under canonical names: fused ones cut, transposed ones turned.

Written from the modeling files, apart from what the package does, so that each can be held against the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

Named = Iterator[tuple[str, np.ndarray]]

_SANDWICH = {
    "post_attention_layernorm": "post_self_attn_norm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_norm",
}
_GPT2 = {
    "transformer.wte": "model.embed_tokens",
    "transformer.wpe": "model.embed_positions",
    "transformer.ln_f": "model.norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_attn": "self_attn.qkv_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_OPT = {
    "model.decoder.embed_tokens": "model.embed_tokens",
    "model.decoder.embed_positions": "model.embed_positions",
    "model.decoder.final_layer_norm": "model.norm",
    "self_attn.out_proj": "self_attn.o_proj",
    "self_attn_layer_norm": "input_layernorm",
    "final_layer_norm": "post_attention_layernorm",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
}
_NEOX = {
    "gpt_neox.embed_in": "model.embed_tokens",
    "gpt_neox.final_layer_norm": "model.norm",
    "embed_out": "lm_head",
    "attention.query_key_value": "self_attn.qkv_proj",
    "attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
_RENAMED = {
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "olmo2": _SANDWICH,
    "gpt2": _GPT2,
    "opt": _OPT,
    "gpt_neox": _NEOX,
    **{name: {"mlp.gate": "mlp.router"} for name in ("mixtral", "qwen3_moe", "olmoe")},
}
_LAYER = re.compile(r"(?:model\.layers|transformer\.h|model\.decoder\.layers|gpt_neox\.layers)\.(\d+)\.(.*)")


def _stacked(model_type: str, stem: str, values: np.ndarray) -> Named:
    """Experts in one array [experts, out, in]; of gpt-oss [experts, in, out], with gates at even rows."""
    part = stem.rpartition(".")[2]
    kind = "bias" if part.endswith("_bias") else "weight"
    part = part.removesuffix("_bias")
    for expert, own in enumerate(values):
        if model_type == "gpt_oss" and kind == "weight":
            own = own.T
        at = f"mlp.experts.{expert}."
        if part == "down_proj":
            yield f"{at}down_proj.{kind}", own
        elif model_type == "gpt_oss":
            yield f"{at}gate_proj.{kind}", own[0::2]
            yield f"{at}up_proj.{kind}", own[1::2]
        else:
            yield f"{at}gate_proj.{kind}", own[: len(own) // 2]
            yield f"{at}up_proj.{kind}", own[len(own) // 2 :]


def canonical(model) -> dict[str, np.ndarray]:
    """Canonical name -> float32 array; a tied head appears once, as the embedding."""
    config = model.config
    result: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().numpy().copy()
        if ".mlp.experts." in name:
            prefix = f"model.layers.{name.split('.')[2]}."
            for key, rows in _stacked(config.model_type, name, values):
                result[prefix + key] = np.ascontiguousarray(rows)
            continue
        prefix, stem, kind = "", *name.rsplit(".", 1)
        layer = _LAYER.fullmatch(stem)
        if layer:
            prefix, stem = f"model.layers.{layer[1]}.", layer[2]
        stem = _RENAMED.get(config.model_type, {}).get(stem, stem)
        if config.model_type == "gpt2" and stem.endswith("proj"):
            values = values.T  # Conv1D: [in, out]
        for part, rows in _CUTS.get(stem.rpartition(".")[2], _whole)(config, values):
            at = f"{stem.rpartition('.')[0]}.{part}" if part else stem
            key = f"{prefix}{at}.{kind}" if stem != "self_attn.sinks" else prefix + stem
            result[key] = np.ascontiguousarray(rows)
    return result


def _whole(config, values: np.ndarray) -> Named:
    yield "", values


def _qkv(config, values: np.ndarray) -> Named:
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q = config.num_attention_heads * dim
    if config.model_type == "gpt_neox":  # every head has its query, key and value together
        heads = values.reshape(config.num_attention_heads, 3, dim, *values.shape[1:])
        for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
            yield part, heads[:, i].reshape(q, *values.shape[1:])
        return
    kv = (len(values) - q) // 2
    yield "q_proj", values[:q]
    yield "k_proj", values[q : q + kv]
    yield "v_proj", values[q + kv :]


def _gate_up(config, values: np.ndarray) -> Named:
    yield "gate_proj", values[: len(values) // 2]
    yield "up_proj", values[len(values) // 2 :]


_CUTS: dict[str, Callable] = {"qkv_proj": _qkv, "gate_up_proj": _gate_up}
