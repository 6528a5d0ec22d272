"""A network's description as data, read from the fields of a transformers config.json.

Everything that decides the function from tokens to logits is a field of ModelConfig; the native decoder
and the NumPy reference are built from it and from nothing else. Readers of other containers (GGUF) present
their metadata with the same keys. Anything that would change the result and is not known is refused.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.families import ACTIVATIONS, FAMILIES, HARMLESS, SUSPECT, Family
from lowbit.model.fields import Fields
from lowbit.model.rope import Rope, parse_rope

# Sizes beyond these are a damaged or hostile file: they bound every product of sizes below 2**52.
MAX_VOCABULARY = 1 << 22
MAX_WIDTH = 1 << 18
MAX_LAYERS = 1 << 12
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 12
MAX_POSITIONS = 1 << 28


@dataclass(frozen=True)
class ModelConfig:
    """One decoder: x += attention(norm(x)), x += mlp(norm(x)) per layer, then norm and the output head."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_position: int  # positions of the published checkpoint
    norm_eps: float
    activation: str  # of the gate: "silu" | "relu2" | "gelu_tanh" | "gelu" (erf) | "relu" | "swiglu_clamped"
    tied: bool  # the output head is the token embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sub_norm: bool
    attention_scale: float  # multiplies q . k
    rope: Rope
    rope_layers: tuple[bool, ...]  # per layer: is it rotated
    windows: tuple[int, ...]  # per layer: how many of the latest positions are seen, itself included; 0: all
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()  # keys of config.json that nothing here reads, for the curious
    norm: str = "rms"  # "rms" | "layer", of the stream; norms of queries, keys and sub norms are always RMS
    norm_bias: bool = False  # biases of the norms of the stream
    norm_offset: float = 0.0  # added to the stored weight of every RMS norm (Gemma: 1)
    norm_place: str = "pre"  # what of a half is normed: "pre": its input | "post": what it adds | "sandwich"
    qk_norm_whole: bool = False  # with qk_norm: one norm over all heads together
    gated: bool = True  # MLP: activation(gate) * up; False: activation(up)
    parallel: bool = False  # attention and MLP read the same stream
    positions: str = "rope"  # "rope" | "learned": a row of a table is added to the embedding
    position_offset: int = 0  # of the table's row of position 0
    embedding_scale: float = 1.0  # multiplies embeddings, not the head
    attention_softcap: float = 0.0  # scores become cap * tanh(score / cap); 0: no cap
    logit_softcap: float = 0.0
    rope_local: Rope | None = None  # the rotation of `local_layers`; None: all use `rope`
    local_layers: tuple[bool, ...] = ()  # per layer; empty: none
    sinks: bool = False  # a learned score per head that takes part in the softmax and adds nothing
    n_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0  # intermediate size of an expert
    router_bias: bool = False
    router_order: str = "softmax_topk"  # "softmax_topk" | "topk_softmax"
    router_renormalize: bool = False  # chosen weights are scaled to a sum of 1
    sparse_layers: tuple[bool, ...] = ()  # per layer: experts in place of the MLP; empty: none

    def sparse(self, layer: int) -> bool:
        """Has this layer experts in place of one MLP?"""
        return bool(self.sparse_layers) and self.sparse_layers[layer]

    def rope_of(self, layer: int) -> Rope:
        """The rotation of one layer, for `inverse_frequencies`; used where rope_layers[layer]."""
        local = self.rope_local is not None and bool(self.local_layers) and self.local_layers[layer]
        return self.rope_local if local and self.rope_local is not None else self.rope

    @property
    def max_context(self) -> int:
        """The longest context that the network may be loaded with."""
        return self.rope.max_context(self.max_position)


def from_transformers(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None, where: str = "config.json"
) -> ModelConfig:
    """Read and check a config.json (and generation_config.json, whose end tokens are added).

    config: the parsed JSON object. where: what error messages call it.
    Raises UnsupportedError for a network that lowbit cannot run, CheckpointError for a damaged description.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where}: expected a JSON object, received {type(config).__name__}")
    family = _family(config, where)
    fields = Fields(config, where, family.defaults)
    _check_quantization(fields)

    hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
    n_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    n_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    n_kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, default=n_heads)
    if n_heads % n_kv_heads:
        raise fields.fail("num_key_value_heads", n_kv_heads, f"a divisor of num_attention_heads={n_heads}")
    if fields.raw("head_dim") is None and hidden % n_heads:
        raise fields.fail(
            "hidden_size", hidden, f"a multiple of num_attention_heads={n_heads} without head_dim"
        )
    head_dim = fields.integer("head_dim", 2, MAX_HEAD_DIM, default=hidden // n_heads)
    if head_dim % 2:
        raise fields.fail("head_dim", head_dim, "even, for features rotate in pairs")
    vocab_size = fields.integer("vocab_size", 1, MAX_VOCABULARY)
    max_position = fields.integer("max_position_embeddings", 1, MAX_POSITIONS)
    name = fields.text("hidden_act")
    if name not in ACTIVATIONS:
        raise UnsupportedError(f"{where}: hidden_act={name!r}; lowbit runs {', '.join(sorted(ACTIVATIONS))}")

    bias = fields.boolean("attention_bias") if family.attention_bias == "field" else False
    rope_layers = _rope_layers(fields, family, n_layers)
    result = ModelConfig(
        family=family.name,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_WIDTH * 4),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=fields.number("rms_norm_eps", 0.0, 0.1),
        activation=ACTIVATIONS[name],
        tied=fields.boolean("tie_word_embeddings"),
        qkv_bias=bias or family.attention_bias == "qkv",
        o_bias=bias,
        mlp_bias=fields.boolean("mlp_bias") if family.mlp_bias == "field" else False,
        qk_norm=family.qk_norm,
        sub_norm=family.sub_norm,
        attention_scale=head_dim**-0.5,
        rope=parse_rope(fields, head_dim, max_position),
        rope_layers=rope_layers,
        windows=_windows(fields, family, n_layers, rope_layers),
        bos_ids=fields.ids("bos_token_id", vocab_size),
        eos_ids=_eos_ids(fields, generation, vocab_size),
        ignored=_ignored(fields),
    )
    if result.sub_norm and n_heads * head_dim != hidden:
        raise fields.fail("head_dim", head_dim, f"hidden_size / num_attention_heads = {hidden}/{n_heads}")
    return result


def _family(config: Mapping[str, Any], where: str) -> Family:
    """The row of FAMILIES that model_type and architectures name together."""
    supported = ", ".join(f"{row.name} ({row.architectures[0]})" for row in FAMILIES.values())
    model_type, listed = config.get("model_type"), config.get("architectures")
    architecture = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(model_type, (str, type(None))) or not isinstance(architecture, (str, type(None))):
        raise CheckpointError(f"{where}: model_type and architectures must be strings")
    if model_type is None and architecture is None:
        raise CheckpointError(
            f"{where}: neither model_type nor architectures is given; lowbit runs {supported}"
        )
    for row in FAMILIES.values():
        if model_type in (row.name, None) and architecture in (*row.architectures, None):
            return row
    received = f"model_type={model_type!r}, architectures={architecture!r}"
    raise UnsupportedError(f"{where}: {received} is not a network that lowbit runs; it runs {supported}")


def _check_quantization(fields: Fields) -> None:
    """Weights stored by another quantizer are not what their names say."""
    given = fields.raw("quantization_config")
    if given is None:
        return
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if method != "lowbit":
        raise UnsupportedError(
            f"{fields.where}: the weights are stored by quant_method={reprlib.repr(method)}; lowbit reads "
            "fp32, fp16 and bf16 weights, GGUF and its own files: start from one of these"
        )


def _rope_layers(fields: Fields, family: Family, n_layers: int) -> tuple[bool, ...]:
    """no_rope_layers holds 1 where a layer IS rotated; absent, every no_rope_layer_interval-th is not."""
    if family.rope_layers == "all":
        return (True,) * n_layers
    interval = fields.integer("no_rope_layer_interval", 1, MAX_LAYERS)
    flags = fields.items("no_rope_layers", int, MAX_LAYERS)
    if flags is None:
        return tuple((layer + 1) % interval != 0 for layer in range(n_layers))
    if len(flags) < n_layers or any(flag not in (0, 1) for flag in flags):
        raise fields.fail("no_rope_layers", flags, f"at least {n_layers} values of 0 or 1")
    return tuple(flag == 1 for flag in flags[:n_layers])


def _windows(fields: Fields, family: Family, n_layers: int, rope_layers: tuple[bool, ...]) -> tuple[int, ...]:
    """The sliding window of each layer, 0 where it sees everything."""
    kinds = fields.items("layer_types", str, MAX_LAYERS)
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(
                f"{fields.where}: layer_types holds {reprlib.repr(kind)}; lowbit runs full_attention and "
                "sliding_attention"
            )
    if kinds is not None and len(kinds) != n_layers:
        raise fields.fail("layer_types", kinds, f"one entry for each of {n_layers} layers")
    window = 0
    if family.window != "none":
        enabled = family.window == "all" or fields.boolean("use_sliding_window")
        given = fields.raw("sliding_window")
        window = fields.integer("sliding_window", 1, MAX_POSITIONS) if enabled and given is not None else 0

    if family.window == "all":
        windows = (window,) * n_layers
        if (
            kinds is not None
            and kinds != (["sliding_attention"] if window else ["full_attention"]) * n_layers
        ):
            raise UnsupportedError(
                f"{fields.where}: family {family.name} has one window for all layers, but layer_types names "
                "several or another"
            )
        return windows
    if kinds is not None:
        if "sliding_attention" in kinds and not window:
            raise fields.fail(
                "layer_types", "sliding_attention", "used with a sliding_window that is enabled"
            )
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if not window:
        return (0,) * n_layers
    if family.window == "no_rope":
        return tuple(0 if rotated else window for rotated in rope_layers)
    first = fields.integer("max_window_layers", 0, MAX_LAYERS)
    return tuple(window if layer >= first else 0 for layer in range(n_layers))


def _eos_ids(fields: Fields, generation: Mapping[str, Any] | None, vocab_size: int) -> tuple[int, ...]:
    """End tokens of config.json, then those that generation_config.json adds."""
    ids = fields.ids("eos_token_id", vocab_size)
    if generation is not None:
        if not isinstance(generation, Mapping):
            raise CheckpointError("generation_config.json: expected a JSON object")
        ids += Fields(generation, "generation_config.json").ids("eos_token_id", vocab_size)
    return tuple(dict.fromkeys(ids))


def _ignored(fields: Fields) -> tuple[str, ...]:
    """Keys that no reader asked for; one that may change the result is refused unless it is neutral."""
    ignored = []
    for key in fields.unread():
        value = fields.raw(key)
        neutral = value is None or value is False or value in ("", [], {})
        neutral = neutral or (not isinstance(value, bool) and value in (0, 1))
        if neutral or key in HARMLESS or key.startswith("_"):
            continue
        if SUSPECT.search(key.lower()):
            raise UnsupportedError(
                f"{fields.where}: {key}={reprlib.repr(value)} may change the result and lowbit does not know "
                "it; remove the key if the network does not depend on it"
            )
        ignored.append(key)
    return tuple(ignored)
