"""What a GGUF file calls things: tensor names and metadata keys, in transformers' words.

Everything here is tables; the code only follows them. A key of the architecture that no table knows is
refused unless its value is neutral, for it may change what the network computes.
Source: gguf-py's constants and llama.cpp's converter, whose permutation of query and key rows is undone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.gguf_tokenizer import gguf_eos_ids


@dataclass(frozen=True)
class Architecture:
    """model_type: the family in transformers' words. permuted: the rows of query and key heads are stored
    in llama.cpp's order of rotated pairs. extra: fields that the metadata leaves unsaid."""

    model_type: str
    permuted: bool
    extra: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2", permuted=False),
    "qwen3": Architecture("qwen3", permuted=False),
    "smollm3": Architecture("smollm3", permuted=True, extra={"no_rope_layer_interval": 4}),
    "bitnet": Architecture("bitnet", permuted=False, extra={"hidden_act": "silu"}),
}

# Tensor name without its suffix -> canonical name without its suffix.
GLOBAL_TENSORS = {
    "token_embd": "model.embed_tokens",
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
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}
ROPE_FACTORS = "rope_freqs.weight"  # divisors of the rotation speeds (llama3 scaling)

# Metadata key behind "<architecture>." -> config.json key.
FIELDS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
# Keys that are read by name below, or say nothing about the function from tokens to logits.
KNOWN = frozenset(
    (
        "vocab_size",
        "attention.value_length",
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_ext_factor",
        "rope.scale_linear",
        "tensor_data_layout",
    )
)
NEUTRAL: tuple[Any, ...] = (0, 1, "", "Meta AI original pth")
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z0-9_]+)\.(weight|bias)")
_GLOBAL = re.compile(r"([a-z0-9_]+)\.(weight|bias)")


def canonical_name(name: str) -> str | None:
    """The canonical name of a GGUF tensor, None for one that no table knows."""
    match = _LAYER.fullmatch(name)
    if match and match[2] in LAYER_TENSORS:
        return f"model.layers.{match[1]}.{LAYER_TENSORS[match[2]]}.{match[3]}"
    match = _GLOBAL.fullmatch(name)
    if match and match[1] in GLOBAL_TENSORS:
        return f"{GLOBAL_TENSORS[match[1]]}.{match[2]}"
    return None


def unpermuted_rows(rows: int, heads: int) -> np.ndarray:
    """The row of the file that holds each row of the transformers order, int64 [rows].

    The converter stores head-wise (half 0, half 1) pairs interleaved: row 2 j + t of a head is row
    t * head_dim / 2 + j in transformers."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def architecture_of(metadata: Mapping[str, Any], path: str) -> Architecture:
    """The row of ARCHITECTURES for `general.architecture`; UnsupportedError when there is none."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedError(
            f"open {path}: general.architecture is {name!r}; lowbit runs {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def transformers_config(
    metadata: Mapping[str, Any],
    path: str,
    vocab_size: int,
    tied: bool,
    attention_bias: bool,
    mlp_bias: bool,
    rope_factors: np.ndarray | None,
) -> dict[str, Any]:
    """The metadata as a config.json.

    vocab_size: rows of the embedding; tied: no output head is stored; attention_bias, mlp_bias: biases are
    stored; rope_factors: the tensor `rope_freqs.weight`, float32 [head_dim / 2], or None.
    """
    architecture = architecture_of(metadata, path)
    prefix = metadata["general.architecture"] + "."
    given = {key[len(prefix) :]: value for key, value in metadata.items() if key.startswith(prefix)}
    _refuse_unknown(given, prefix, path)

    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(gguf_eos_ids(metadata)),
    }
    for key, name in FIELDS.items():
        if key in given:
            config[name] = _scalar(given[key], prefix + key, path)
    config.setdefault("rope_theta", 10000.0)
    if architecture.model_type in ("llama", "smollm3", "qwen3", "bitnet"):
        config["attention_bias"] = attention_bias
    if architecture.model_type in ("llama", "smollm3"):
        config["mlp_bias"] = mlp_bias
    window = given.get("attention.sliding_window", 0)
    if window:
        if architecture.model_type != "llama":
            raise UnsupportedError(
                f"open {path}: {prefix}attention.sliding_window={window}, which layers use it is not known"
            )
        config |= {"model_type": "mistral", "sliding_window": window}
    _set_head(config, given, prefix, path)
    config["rope_scaling"] = _rope_scaling(given, prefix, path, rope_factors)
    return config | dict(architecture.extra)


def _refuse_unknown(given: Mapping[str, Any], prefix: str, path: str) -> None:
    for key, value in given.items():
        neutral = value is False or (not isinstance(value, (bool, np.ndarray, list)) and value in NEUTRAL)
        if (
            key not in FIELDS
            and key not in KNOWN
            and not neutral
            and (key, value) != ("attention.causal", True)
        ):
            raise UnsupportedError(
                f"open {path}: {prefix}{key}={str(value)[:60]} may change the result and is not known here"
            )


def _scalar(value: Any, key: str, path: str) -> Any:
    """A number; a list of equal numbers, one per layer, counts as that number."""
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        return value[0].item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnsupportedError(f"open {path}: {key}={str(value)[:60]}; lowbit runs one number for all layers")
    return value


def _set_head(config: dict[str, Any], given: Mapping[str, Any], prefix: str, path: str) -> None:
    """Say how wide a head is; keys, values and the rotated part must all be."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise CheckpointError(
            f"open {path}: {prefix}attention.head_count or embedding_length is missing; convert again"
        )
    head_dim = config.setdefault("head_dim", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, head_dim) != head_dim:
            raise UnsupportedError(
                f"open {path}: {prefix}{key}={given[key]} with heads of {head_dim}; lowbit runs equal sizes"
            )


def _rope_scaling(
    given: Mapping[str, Any], prefix: str, path: str, rope_factors: np.ndarray | None
) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json, None without scaling."""
    kind = given.get("rope.scaling.type", "linear" if "rope.scale_linear" in given else "none")
    factor = given.get("rope.scaling.factor", given.get("rope.scale_linear", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(
            f"open {path}: {prefix}rope.scaling.type={kind!r}; lowbit runs none, linear and yarn"
        )
    scaled = kind == "yarn" or (kind == "linear" and factor != 1.0)
    if rope_factors is not None:
        if scaled:
            raise UnsupportedError(
                f"open {path}: rope scaling {kind!r} together with {ROPE_FACTORS}; one at a time"
            )
        return {"rope_type": "factors", "factors": [float(value) for value in rope_factors]}
    if not scaled:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return {"rope_type": "yarn", "factor": factor} | _yarn(given, prefix, path, factor)


def _yarn(given: Mapping[str, Any], prefix: str, path: str, factor: Any) -> dict[str, Any]:
    """The parameters of yarn. llama.cpp multiplies its attention factor onto 0.1 ln(factor) + 1."""
    settings: dict[str, Any] = {}
    original = given.get("rope.scaling.original_context_length")
    if original is not None:
        settings["original_max_position_embeddings"] = original
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if f"rope.scaling.{key}" in given:
            settings[name] = given[f"rope.scaling.{key}"]
    if given.get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise UnsupportedError(
            f"open {path}: {prefix}rope.scaling.yarn_ext_factor other than 1 is not supported"
        )
    attention = given.get("rope.scaling.yarn_attn_factor", given.get("rope.scaling.attn_factor", 1.0))
    numbers = isinstance(attention, (int, float)) and isinstance(factor, (int, float))
    if numbers and attention != 1.0 and factor > 1:
        settings["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return settings
