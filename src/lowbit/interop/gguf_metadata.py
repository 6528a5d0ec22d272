"""A network's description as GGUF metadata: the inverse of model/gguf_config.py.

What was written is read back and compared: a network that the file would describe otherwise is refused, so
that nobody computes another function with it.
Source: gguf-py's constants and llama.cpp's converter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.interop.gguf_writer import Pair
from lowbit.model.config import ModelConfig, from_transformers
from lowbit.model.gguf_config import transformers_config
from lowbit.model.gguf_names import (
    ARCHITECTURE_OF,
    ARCHITECTURES,
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Architecture,
)
from lowbit.model.rope import inverse_frequencies

QUANTIZATION_VERSION = 2
_OF_WRITER = frozenset({"general.alignment", "general.file_type", "general.quantization_version"})
# Not said by GGUF, or said of the tokenizer; the rotation is compared by its speeds.
_UNCOMPARED = frozenset({"family", "ignored", "bos_ids", "eos_ids", "rope", "rope_local"})
_CLOSE = 1e-6  # metadata is float32


def architecture(config: ModelConfig) -> tuple[str, Architecture]:
    """general.architecture and its row. Raises UnsupportedError where there is none."""
    name = ARCHITECTURE_OF.get(config.family)
    if name is None:
        raise UnsupportedError(
            f"export to GGUF: {config.family} networks have no architecture that lowbit writes; it writes "
            f"{', '.join(sorted(ARCHITECTURE_OF))}"
        )
    return name, ARCHITECTURES[name]


def rope_vectors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors of rotation factors, float32 [rotary_dim / 2]: divisors of the speeds."""
    rope = config.rope
    if config.positions != "rope":
        return {}
    if rope.kind == "longrope":
        both = {SHORT_FACTORS: rope.factors, LONG_FACTORS: rope.long_factors}
        return {name: np.array(values, np.float32) for name, values in both.items()}
    if rope.kind == "factors":
        return {ROPE_FACTORS: np.array(rope.factors, np.float32)}
    if rope.kind == "llama3":
        pairs = rope.rotary_dim // 2
        speeds, _ = inverse_frequencies(config, config.max_position)
        plain = rope.theta ** -(np.arange(pairs, dtype=np.float64) / pairs)
        return {ROPE_FACTORS: (plain / np.asarray(speeds, np.float64)).astype(np.float32)}
    return {}


def description(
    config: ModelConfig,
    title: str,
    file_type: int,
    tensors: Collection[str],
    vectors: Mapping[str, np.ndarray],
) -> list[Pair]:
    """Metadata of the network.

    title: its name; tensors: names of all tensors of the file; vectors: see rope_vectors.
    Raises UnsupportedError for a network that the file would describe otherwise.
    """
    name, row = architecture(config)
    pairs: list[Pair] = [
        ("general.architecture", "str", name),
        ("general.type", "str", "model"),
        ("general.name", "str", title),
        ("general.file_type", "u32", file_type),
        ("general.quantization_version", "u32", QUANTIZATION_VERSION),
    ]
    numbers = _numbers(config) | _rotation(config) | _windows(config, row)
    pairs += [(f"{name}.{key}", kind, value) for key, (kind, value) in numbers.items()]
    _check(config, pairs, tensors, vectors)
    return pairs


def copied(metadata: Mapping[str, Any], file_type: int) -> list[Pair]:
    """The metadata of a GGUF file for another one of the same model."""
    pairs = [_pair(key, value) for key, value in metadata.items() if key not in _OF_WRITER]
    pairs.append(("general.file_type", "u32", file_type))
    pairs.append(("general.quantization_version", "u32", QUANTIZATION_VERSION))
    return pairs


def _pair(key: str, value: Any) -> Pair:
    """A metadata value of the reader with its kind."""
    if isinstance(value, bool):
        return key, "bool", value
    if isinstance(value, str):
        return key, "str", value
    if isinstance(value, float):
        return key, "f32", value
    if isinstance(value, int):
        return key, "u32" if 0 <= value < 1 << 32 else "i32" if -(1 << 31) <= value < 0 else "i64", value
    if isinstance(value, np.ndarray):
        kind = "bool" if value.dtype == bool else f"{value.dtype.kind}{8 * value.dtype.itemsize}"
        return key, f"[{kind}]", value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return key, "[str]", value
    raise UnsupportedError(f"export to GGUF: metadata {key} is a list of lists, which lowbit does not write")


def _numbers(config: ModelConfig) -> dict[str, tuple[str, Any]]:
    """Sizes and what else is a number."""
    epsilon = "layer_norm_epsilon" if config.norm == "layer" else "layer_norm_rms_epsilon"
    numbers: dict[str, tuple[str, Any]] = {
        "vocab_size": ("u32", config.vocab_size),
        "context_length": ("u32", config.max_position),
        "embedding_length": ("u32", config.hidden_size),
        "block_count": ("u32", config.n_layers),
        "feed_forward_length": ("u32", config.intermediate_size),
        "attention.head_count": ("u32", config.n_heads),
        "attention.head_count_kv": ("u32", config.n_kv_heads),
        "attention.key_length": ("u32", config.head_dim),
        "attention.value_length": ("u32", config.head_dim),
        f"attention.{epsilon}": ("f32", config.norm_eps),
    }
    if config.attention_softcap:
        numbers["attn_logit_softcapping"] = ("f32", config.attention_softcap)
    if config.logit_softcap:
        numbers["final_logit_softcapping"] = ("f32", config.logit_softcap)
    if config.family == "gpt_neox":
        numbers["use_parallel_residual"] = ("bool", config.parallel)
    if config.n_experts:
        numbers["expert_count"] = ("u32", config.n_experts)
        numbers["expert_used_count"] = ("u32", config.experts_per_token)
        numbers["expert_feed_forward_length"] = ("u32", config.expert_size)
    return numbers


def _windows(config: ModelConfig, row: Architecture) -> dict[str, tuple[str, Any]]:
    """Sliding windows; which layers have one is the architecture's, and said only where it is not."""
    window = max(config.windows, default=0)
    if not window:
        return {}
    keys: dict[str, tuple[str, Any]] = {"attention.sliding_window": ("u32", window)}
    slides = [bool(size) for size in config.windows]
    every = row.window_pattern
    if every and slides != [bool((layer + 1) % every) for layer in range(config.n_layers)]:
        keys["attention.sliding_window_pattern"] = ("[bool]", slides)
    return keys


def _rotation(config: ModelConfig) -> dict[str, tuple[str, Any]]:
    """The keys of the rotation and its scaling."""
    rope = config.rope
    if config.positions != "rope":
        return {}
    keys: dict[str, tuple[str, Any]] = {
        "rope.dimension_count": ("u32", rope.rotary_dim),
        "rope.freq_base": ("f32", rope.theta),
    }
    if config.rope_local is not None:
        keys["rope.freq_base_swa"] = ("f32", config.rope_local.theta)
    if rope.kind in ("default", "llama3", "factors"):  # the last two: see rope_vectors
        return keys
    if rope.kind == "linear":
        return keys | {"rope.scaling.type": ("str", "linear"), "rope.scaling.factor": ("f32", rope.factor)}
    if rope.kind == "longrope":
        _, attention = inverse_frequencies(config, config.max_position)
        return keys | {
            "rope.scaling.original_context_length": ("u32", rope.original_max_position),
            "rope.scaling.attn_factor": ("f32", attention),
        }
    truncate = ARCHITECTURES[ARCHITECTURE_OF[config.family]].scaling.get("truncate", True)
    if rope.kind != "yarn" or rope.mscale or rope.mscale_all_dim or rope.truncate != truncate:
        raise UnsupportedError(f"export to GGUF: rope scaling {rope.kind!r} of this kind has no keys there")
    keys |= {
        "rope.scaling.type": ("str", "yarn"),
        "rope.scaling.factor": ("f32", rope.factor),
        "rope.scaling.original_context_length": ("u32", rope.original_max_position),
        "rope.scaling.yarn_beta_fast": ("f32", rope.beta_fast),
        "rope.scaling.yarn_beta_slow": ("f32", rope.beta_slow),
    }
    if rope.attention_factor is not None:  # llama.cpp multiplies it onto 0.1 ln(factor) + 1
        own = 0.1 * math.log(rope.factor) + 1.0
        keys["rope.scaling.yarn_attn_factor"] = ("f32", rope.attention_factor / own)
    return keys


def _check(
    config: ModelConfig, pairs: list[Pair], tensors: Collection[str], vectors: Mapping[str, np.ndarray]
) -> None:
    """Raise UnsupportedError unless the metadata reads as `config`."""
    what = "the exported metadata"
    metadata = {key: np.float32(v).item() if kind == "f32" else v for key, kind, v in pairs}
    metadata = {key: np.array(v) if isinstance(v, list) else v for key, v in metadata.items()}
    try:
        fields = transformers_config(metadata, what, config.vocab_size, tensors, vectors)
        again = from_transformers(fields, where=what)
    except (UnsupportedError, CheckpointError) as error:
        raise UnsupportedError(
            f"export to GGUF: this {config.family} network cannot be described there ({error})"
        ) from error
    before, after = asdict(config), asdict(again)
    changed = [key for key in before if key not in _UNCOMPARED and not _alike(before[key], after[key])]
    if not changed and config.positions == "rope":
        one, other = (inverse_frequencies(c, c.max_position) for c in (config, again))
        if not np.allclose(one[0], other[0], rtol=1e-5) or not math.isclose(one[1], other[1], rel_tol=1e-5):
            changed.append("rope")
    if changed:
        told = ", ".join(f"{key} {str(before[key])[:40]}" for key in changed[:3] if key in before)
        raise UnsupportedError(
            f"export to GGUF: this {config.family} network has {told or 'a rotation'}, for which the format "
            "has no words, so llama.cpp would not compute it; take a safetensors target"
        )


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=_CLOSE)
    return bool(one == other)
