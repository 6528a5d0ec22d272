"""The metadata of a GGUF file as a config.json in transformers' words.

Everything here is tables; the code only follows them. A key of the architecture that no table knows is
refused unless its value is neutral, for it may change what the network computes.
Source: gguf-py's constants, llama.cpp's converter and, for what files leave unsaid, its loader.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.families import FAMILIES
from lowbit.model.gguf_names import (
    ARCHITECTURES,
    GLOBAL_TENSORS,
    LAYER_TENSORS,
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Architecture,
)
from lowbit.model.gguf_tokenizer import gguf_eos_ids
from lowbit.model.sources import unpermuted_rows

__all__ = [
    "ARCHITECTURES",
    "FIELDS",
    "GLOBAL_TENSORS",
    "LAYER_TENSORS",
    "ROPE_FACTORS",
    "architecture_of",
    "rotated_share",
    "transformers_config",
    "unpermuted_rows",
]

# Metadata key behind "<architecture>." -> config.json key.
FIELDS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
# Keys that are read by name below, or say nothing about the function from tokens to logits.
KNOWN = frozenset(
    (
        "vocab_size",
        "attention.value_length",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "use_parallel_residual",
        "expert_feed_forward_length",
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
_MAX_LAYERS = 1 << 12


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
    tensors: Collection[str],
    vectors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """The metadata as a config.json.

    vocab_size: rows of the embedding; tensors: names of all tensors in the file; vectors: float32, those of
    the rotation factors that the file has (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS)
    """
    architecture = architecture_of(metadata, path)
    prefix = metadata["general.architecture"] + "."
    given = {key[len(prefix) :]: value for key, value in metadata.items() if key.startswith(prefix)}
    _refuse_unknown(given, prefix, path)
    model_type = _model_type(architecture, given)
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedError(f"open {path}: lowbit does not run {model_type} networks")

    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(gguf_eos_ids(metadata)),
    }
    for key, name in FIELDS.items():
        if key in given:
            config[name] = _scalar(given[key], prefix + key, path)
    if family.experts is None:
        for name in ("num_local_experts", "num_experts_per_tok"):
            if config.get(name) in (0, 1):  # one expert is an MLP
                del config[name]
    elif "expert_feed_forward_length" in given:
        key = "expert_feed_forward_length"
        config[family.experts.size] = _scalar(given[key], prefix + key, path)
    if family.parallel == "field" or given.get("use_parallel_residual"):
        config["use_parallel_residual"] = given.get("use_parallel_residual", True)
    if family.attention_bias == "field":
        config["attention_bias"] = any(f"blk.0.{name}.bias" in tensors for name in ("attn_q", "attn_qkv"))
    if family.mlp_bias == "field":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    _set_windows(config, architecture, given, prefix, path)
    _set_head(config, given, prefix, path, partial=family.rotary == "partial")
    if family.positions == "rope":
        config.setdefault("rope_theta", 10000.0)
        config["rope_scaling"] = scaling = _rope_scaling(given, prefix, path, vectors)
        if scaling:
            scaling |= architecture.scaling
        if scaling and scaling["rope_type"] == "longrope":  # config.json has it outside, and reads that first
            config["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    if family.attention_scale == "query_pre_attn_scalar":
        other = config.get("num_hidden_layers") == architecture.scale_of
        config["query_pre_attn_scalar"] = (
            config["hidden_size"] // config["num_attention_heads"] if other else config["head_dim"]
        )
    config |= dict(architecture.fields)
    return {family.names.get(key, key): value for key, value in config.items()}


def _model_type(architecture: Architecture, given: Mapping[str, Any]) -> str:
    if given.get("expert_count", 0) and architecture.experts is not None:
        return architecture.experts
    if given.get("attention.sliding_window", 0) and architecture.family == "llama":
        return "mistral"
    return architecture.family


def _set_windows(
    config: dict[str, Any], architecture: Architecture, given: Mapping[str, Any], prefix: str, path: str
) -> None:
    """sliding_window, and layer_types where only some layers have it."""
    window = given.get("attention.sliding_window", 4096 if architecture.family == "gemma2" else 0)
    pattern = given.get("attention.sliding_window_pattern", architecture.window_pattern)
    layers = config.get("num_hidden_layers", 0)
    if not isinstance(window, int) or isinstance(window, bool) or not isinstance(layers, int):
        raise CheckpointError(f"open {path}: {prefix}attention.sliding_window={window!r} is not a number")
    if not window:
        if architecture.window_pattern:
            config |= {"sliding_window": 1, "layer_types": ["full_attention"] * min(layers, _MAX_LAYERS)}
        return
    if isinstance(pattern, np.ndarray) and pattern.ndim == 1 and len(pattern) == layers:
        slides = [bool(value) for value in pattern]
    elif not isinstance(pattern, int) or isinstance(pattern, bool) or not 0 <= pattern <= _MAX_LAYERS:
        raise UnsupportedError(
            f"open {path}: {prefix}attention.sliding_window_pattern={str(pattern)[:60]}; lowbit reads one "
            "number, or one flag for each layer"
        )
    else:
        slides = [
            bool((layer + 1) % pattern) if pattern else True for layer in range(min(layers, _MAX_LAYERS))
        ]
    if not any(slides):
        window = 0
    if architecture.window_pattern:
        kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
        config |= {"sliding_window": window or 1, "layer_types": kinds}
    elif window:
        if architecture.family not in ("llama", "phi3") or not all(slides):
            raise UnsupportedError(
                f"open {path}: {prefix}attention.sliding_window={window}, which layers use it is not known"
            )
        config["sliding_window"] = window


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


def _set_head(
    config: dict[str, Any], given: Mapping[str, Any], prefix: str, path: str, partial: bool
) -> None:
    """Say how wide a head is; keys and values must be, and the rotated part unless it may be `partial`."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise CheckpointError(
            f"open {path}: {prefix}attention.head_count or embedding_length is missing; convert again"
        )
    head_dim = config.setdefault("head_dim", hidden // heads)
    rotated = given.get("rope.dimension_count", head_dim)
    if partial and isinstance(rotated, int) and isinstance(head_dim, int) and 0 < rotated <= head_dim:
        config["partial_rotary_factor"] = rotated_share(rotated, head_dim)
    else:
        partial = False
    for key in ("attention.value_length", *(() if partial else ("rope.dimension_count",))):
        if given.get(key, head_dim) != head_dim:
            raise UnsupportedError(
                f"open {path}: {prefix}{key}={given[key]} with heads of {head_dim}; lowbit runs equal sizes"
            )


def rotated_share(rotary_dim: int, head_dim: int) -> float:
    """The partial_rotary_factor whose product with head_dim, cut to an integer, is rotary_dim."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 1.0)


def _rope_scaling(
    given: Mapping[str, Any], prefix: str, path: str, vectors: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json, None without scaling."""
    kind = given.get("rope.scaling.type", "linear" if "rope.scale_linear" in given else "none")
    factor = given.get("rope.scaling.factor", given.get("rope.scale_linear", 1.0))
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedError(
            f"open {path}: {prefix}rope.scaling.type={kind!r}; lowbit runs none, linear, yarn and longrope"
        )
    factors = {name: [float(value) for value in vector] for name, vector in vectors.items()}
    if SHORT_FACTORS in factors and LONG_FACTORS in factors:
        return {
            "rope_type": "longrope",
            "short_factor": factors[SHORT_FACTORS],
            "long_factor": factors[LONG_FACTORS],
            "original_max_position_embeddings": given.get("rope.scaling.original_context_length"),
            "attention_factor": given.get("rope.scaling.attn_factor", 1.0),
        }
    if kind == "longrope" or SHORT_FACTORS in factors or LONG_FACTORS in factors:
        raise CheckpointError(
            f"open {path}: longrope needs {SHORT_FACTORS} and {LONG_FACTORS}; the file is incomplete"
        )
    scaled = kind == "yarn" or (kind == "linear" and factor != 1.0)
    if ROPE_FACTORS in factors:
        if scaled:
            raise UnsupportedError(
                f"open {path}: rope scaling {kind!r} together with {ROPE_FACTORS}; one at a time"
            )
        return {"rope_type": "factors", "factors": factors[ROPE_FACTORS]}
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
