"""A network's description as GGUF metadata: the inverse of model/gguf_config.py.

What GGUF has no key for is refused here, so that nobody computes another function with the file.
Source: gguf-py's constants and llama.cpp's converter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.interop.gguf_writer import Pair
from lowbit.model.config import ModelConfig
from lowbit.model.gguf_config import ARCHITECTURES, GLOBAL_TENSORS, LAYER_TENSORS, unpermuted_rows
from lowbit.model.rope import inverse_frequencies

# Family -> (architecture, activation that it stands for).
_FAMILIES = {
    "llama": ("llama", "silu"),
    "mistral": ("llama", "silu"),
    "qwen2": ("qwen2", "silu"),
    "qwen3": ("qwen3", "silu"),
    "smollm3": ("smollm3", "silu"),
    "bitnet": ("bitnet", "silu"),
}
_GLOBAL = {stem: name for name, stem in GLOBAL_TENSORS.items()}
_LAYER = {stem: name for name, stem in LAYER_TENSORS.items()}
_BY_READER = frozenset({"general.alignment", "general.file_type", "general.quantization_version"})
QUANTIZATION_VERSION = 2


def tensor_name(canonical: str) -> str:
    """The name in the file of a tensor. Raises UnsupportedError where GGUF has none."""
    stem, _, suffix = canonical.rpartition(".")
    if stem in _GLOBAL:
        return f"{_GLOBAL[stem]}.{suffix}"
    parts = stem.split(".", 3)
    if len(parts) == 4 and parts[3] in _LAYER:
        return f"blk.{parts[2]}.{_LAYER[parts[3]]}.{suffix}"
    raise UnsupportedError(f"export to GGUF: {canonical} has no name there; take compressed-tensors")


def row_order(canonical: str, config: ModelConfig, rows: int) -> np.ndarray | None:
    """Row r of the file is row order[r] of the tensor; None where they lie alike."""
    architecture = _FAMILIES[config.family][0]
    stem = canonical.rpartition(".")[0]
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(stem.rpartition(".")[2])
    if heads is None or not ARCHITECTURES[architecture].permuted:
        return None
    return np.argsort(unpermuted_rows(rows, heads))


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """The tensor rope_freqs.weight, float32 [rotary_dim / 2]: divisors of the rotation speeds, or None."""
    if config.rope.kind not in ("llama3", "factors"):
        return None
    pairs = config.rope.rotary_dim // 2
    speeds, _ = inverse_frequencies(config, config.max_position)
    plain = config.rope.theta ** -(np.arange(pairs, dtype=np.float64) / pairs)
    if config.rope.kind == "factors":
        return np.array(config.rope.factors, np.float32)
    return (plain / np.asarray(speeds, np.float64)).astype(np.float32)


def description(config: ModelConfig, name: str, file_type: int) -> list[Pair]:
    """Metadata of the network. Raises UnsupportedError for one that llama.cpp would compute otherwise."""
    architecture = _architecture(config)
    pairs: list[Pair] = [
        ("general.architecture", "str", architecture),
        ("general.type", "str", "model"),
        ("general.name", "str", name),
        ("general.file_type", "u32", file_type),
        ("general.quantization_version", "u32", QUANTIZATION_VERSION),
    ]
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
        "attention.layer_norm_rms_epsilon": ("f32", config.norm_eps),
        "rope.dimension_count": ("u32", config.rope.rotary_dim),
        "rope.freq_base": ("f32", config.rope.theta),
    }
    window = max(config.windows, default=0)
    if window:
        numbers["attention.sliding_window"] = ("u32", window)
    numbers |= _scaling(config)
    pairs += [(f"{architecture}.{key}", kind, value) for key, (kind, value) in numbers.items()]
    return pairs


def copied(metadata: Mapping[str, Any], file_type: int) -> list[Pair]:
    """The metadata of a GGUF file for another one of the same model."""
    pairs = [_pair(key, value) for key, value in metadata.items() if key not in _BY_READER]
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


def _architecture(config: ModelConfig) -> str:
    what = f"export to GGUF: this {config.family} network"
    if config.family not in _FAMILIES:
        raise UnsupportedError(
            f"{what} has no architecture that lowbit writes; it writes {', '.join(_FAMILIES)}"
        )
    architecture, activation = _FAMILIES[config.family]
    if config.activation != activation:
        raise UnsupportedError(
            f"{what} has activation {config.activation}; {architecture} in llama.cpp has {activation}"
        )
    if not math.isclose(config.attention_scale, config.head_dim**-0.5, rel_tol=1e-6):
        raise UnsupportedError(
            f"{what} scales attention by {config.attention_scale:g}; GGUF has no key for it"
        )
    windows = set(config.windows)
    if windows != {0} and config.family != "mistral":
        raise UnsupportedError(f"{what} has sliding windows, which {architecture} in llama.cpp has not")
    if config.family == "smollm3":
        pattern = tuple((layer + 1) % 4 != 0 for layer in range(config.n_layers))
        if config.rope_layers != pattern:
            raise UnsupportedError(f"{what} rotates other layers than three of four, which llama.cpp assumes")
    elif not all(config.rope_layers):
        raise UnsupportedError(f"{what} has layers without rotation, which {architecture} has not")
    return architecture


def _scaling(config: ModelConfig) -> dict[str, tuple[str, Any]]:
    """The keys of rope scaling."""
    rope = config.rope
    if rope.kind in ("default", "llama3", "factors"):  # the last two: see rope_factors
        return {}
    if rope.kind == "linear":
        return {"rope.scaling.type": ("str", "linear"), "rope.scaling.factor": ("f32", rope.factor)}
    if rope.kind != "yarn" or rope.mscale or rope.mscale_all_dim or not rope.truncate:
        raise UnsupportedError(
            f"export to GGUF: rope scaling {rope.kind!r} with its settings has no keys there"
        )
    keys: dict[str, tuple[str, Any]] = {
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
