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
from lowbit.model.experts_config import read_experts
from lowbit.model.families import FAMILIES
from lowbit.model.family import ACTIVATIONS, HARMLESS, SUSPECT, Family
from lowbit.model.fields import Fields
from lowbit.model.layer_kinds import MAX_LAYERS, MAX_POSITIONS, read_rope_layers, read_windows
from lowbit.model.rope import Rope, parse_local_rope, parse_rope
from lowbit.model.stored.tensors import quantization_of

# Sizes beyond these are a damaged or hostile file: they bound every product of sizes below 2**52.
MAX_VOCABULARY = 1 << 22
MAX_WIDTH = 1 << 18
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 12


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
    fields = Fields(config, where, family.defaults, family.names)
    _check_quantization(fields)
    fields.ignore(family.unread)

    hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
    _check_fixed(fields, family, hidden)
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

    attention_bias = family.attention_bias == "always"
    if family.attention_bias == "field":
        attention_bias = fields.boolean("attention_bias")
    rope_layers = read_rope_layers(fields, family, n_layers)
    windows = read_windows(fields, family, n_layers, rope_layers)
    rope, rope_local = _ropes(fields, family, head_dim, max_position)
    result = ModelConfig(
        family=family.name,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=fields.integer(
            "intermediate_size", 1, MAX_WIDTH * 4, default=family.inner * hidden or None
        ),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=family.norm_eps or fields.number("rms_norm_eps", 0.0, 0.1),
        activation=_activation(fields, family),
        tied=fields.boolean("tie_word_embeddings"),
        qkv_bias=attention_bias or family.attention_bias == "qkv",
        o_bias=attention_bias,
        mlp_bias=fields.boolean("mlp_bias") if family.mlp_bias == "field" else family.mlp_bias == "always",
        qk_norm=family.qk_norm != "none",
        sub_norm=family.sub_norm,
        attention_scale=_attention_scale(fields, family, head_dim),
        rope=rope,
        rope_layers=rope_layers,
        windows=windows,
        bos_ids=fields.ids("bos_token_id", vocab_size),
        eos_ids=_eos_ids(fields, generation, vocab_size),
        norm=family.norm,
        norm_bias=family.norm == "layer",
        norm_offset=family.norm_offset,
        norm_place=family.norm_place,
        qk_norm_whole=family.qk_norm == "whole",
        gated=family.gated,
        parallel=fields.boolean("use_parallel_residual") if family.parallel == "field" else False,
        positions=family.positions,
        position_offset=family.position_offset,
        embedding_scale=hidden**0.5 if family.scaled_embedding else 1.0,
        attention_softcap=_softcap(fields, "attn_logit_softcapping", family.softcaps == "both"),
        logit_softcap=_softcap(fields, "final_logit_softcapping", family.softcaps != "none"),
        rope_local=rope_local,
        local_layers=tuple(window > 0 for window in windows) if rope_local else (),
        sinks=family.sinks,
        **read_experts(fields, family, n_layers),
        ignored=_ignored(fields),
    )
    if result.sub_norm and n_heads * head_dim != hidden:
        raise fields.fail("head_dim", head_dim, f"hidden_size / num_attention_heads = {hidden}/{n_heads}")
    return result


def _check_fixed(fields: Fields, family: Family, hidden: int) -> None:
    """Variants of a family that run nowhere here."""
    for key, only in family.fixed.items():
        value, wanted = fields.raw(key), hidden if only == "hidden_size" else only
        if value is not None and value != wanted:
            raise UnsupportedError(
                f"{fields.where}: {key}={reprlib.repr(value)}; lowbit runs {family.name} networks with "
                f"{key}={wanted} only"
            )


def _activation(fields: Fields, family: Family) -> str:
    name, known = fields.text("hidden_act"), {**ACTIVATIONS, **family.activations}
    if name not in known:
        raise UnsupportedError(
            f"{fields.where}: {fields.key('hidden_act')}={name!r}; lowbit runs {', '.join(sorted(known))}"
        )
    return known[name]


def _attention_scale(fields: Fields, family: Family, head_dim: int) -> float:
    if family.attention_scale == "query_pre_attn_scalar":
        return fields.number("query_pre_attn_scalar", 1e-6, 1e9) ** -0.5
    if family.attention_scale == "field" and not fields.boolean("scale_attn_weights"):
        return 1.0
    return head_dim**-0.5


def _softcap(fields: Fields, key: str, read: bool) -> float:
    """0 where the family has none, or null says that this network has none."""
    return fields.number(key, 1e-3, 1e6) if read and fields.raw(key) is not None else 0.0


def _ropes(fields: Fields, family: Family, head_dim: int, max_position: int) -> tuple[Rope, Rope | None]:
    """The rotation of most layers, and that of layers with a window where it is another."""
    if family.positions == "learned":
        return Rope(10000.0, 0), None
    if family.rotary == "local":
        return parse_local_rope(fields, head_dim, max_position)
    return parse_rope(fields, head_dim, max_position, partial=family.rotary == "partial"), None


def _family(config: Mapping[str, Any], where: str) -> Family:
    """The row of FAMILIES that model_type and architectures name together."""
    supported = ", ".join(FAMILIES)
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
    raise UnsupportedError(
        f"{where}: {received} is not a network that lowbit runs; it runs {supported}, each "
        "as a causal language model"
    )


def _check_quantization(fields: Fields) -> None:
    """Weights of a quantizer that nothing here reads are not what their names say."""
    quantization_of(
        {key: fields.raw(key) for key in ("quantization_config", "compression_config")}, fields.where
    )


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
