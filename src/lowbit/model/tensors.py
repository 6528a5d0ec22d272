"""The tensors of a described network: canonical names, shapes, native names, and which read the same input.

Canonical names are those of transformers' Llama, whatever a checkpoint calls them. Norms on what attention or
the MLP adds to the stream are `post_self_attn_norm` and `post_mlp_norm`; `post_attention_layernorm` is always
the norm before the MLP. An MLP without a gate has `up_proj` and `down_proj` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.model.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
POSITIONS = "model.embed_positions.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
FINAL_NORM_BIAS = "model.norm.bias"


def _normed_input(config: ModelConfig) -> bool:
    return config.norm_place in ("pre", "sandwich")


def _normed_output(config: ModelConfig) -> bool:
    return config.norm_place in ("post", "sandwich")


@dataclass(frozen=True)
class Tensor:
    name: str  # canonical name, without `model.layers.N.`
    native: str  # its name in the native decoder
    shape: tuple[str, ...]  # symbols of `_sizes`
    present: Callable[[ModelConfig], bool] | None = None  # None: in every network


ATTENTION_TENSORS = (
    Tensor("input_layernorm.weight", "input_norm", ("hidden",), _normed_input),
    Tensor(
        "input_layernorm.bias", "input_norm_bias", ("hidden",), lambda c: c.norm_bias and _normed_input(c)
    ),
    Tensor("self_attn.q_proj.weight", "q", ("q", "hidden")),
    Tensor("self_attn.k_proj.weight", "k", ("kv", "hidden")),
    Tensor("self_attn.v_proj.weight", "v", ("kv", "hidden")),
    Tensor("self_attn.o_proj.weight", "o", ("hidden", "q")),
    Tensor("self_attn.q_proj.bias", "q_bias", ("q",), lambda c: c.qkv_bias),
    Tensor("self_attn.k_proj.bias", "k_bias", ("kv",), lambda c: c.qkv_bias),
    Tensor("self_attn.v_proj.bias", "v_bias", ("kv",), lambda c: c.qkv_bias),
    Tensor("self_attn.o_proj.bias", "o_bias", ("hidden",), lambda c: c.o_bias),
    Tensor("self_attn.q_norm.weight", "q_norm", ("q_norm",), lambda c: c.qk_norm),
    Tensor("self_attn.k_norm.weight", "k_norm", ("k_norm",), lambda c: c.qk_norm),
    Tensor("self_attn.sinks", "sinks", ("heads",), lambda c: c.sinks),
    Tensor("self_attn.attn_sub_norm.weight", "attn_sub_norm", ("q",), lambda c: c.sub_norm),
    Tensor("post_self_attn_norm.weight", "attn_out_norm", ("hidden",), _normed_output),
)
MLP_NORMS = (
    Tensor("post_attention_layernorm.weight", "post_norm", ("hidden",), _normed_input),
    Tensor(
        "post_attention_layernorm.bias",
        "post_norm_bias",
        ("hidden",),
        lambda c: c.norm_bias and _normed_input(c),
    ),
    Tensor("post_mlp_norm.weight", "mlp_out_norm", ("hidden",), _normed_output),
)
MLP_TENSORS = (
    Tensor("mlp.gate_proj.weight", "gate", ("ffn", "hidden"), lambda c: c.gated),
    Tensor("mlp.up_proj.weight", "up", ("ffn", "hidden")),
    Tensor("mlp.down_proj.weight", "down", ("hidden", "ffn")),
    Tensor("mlp.gate_proj.bias", "gate_bias", ("ffn",), lambda c: c.gated and c.mlp_bias),
    Tensor("mlp.up_proj.bias", "up_bias", ("ffn",), lambda c: c.mlp_bias),
    Tensor("mlp.down_proj.bias", "down_bias", ("hidden",), lambda c: c.mlp_bias),
    Tensor("mlp.ffn_sub_norm.weight", "ffn_sub_norm", ("ffn",), lambda c: c.sub_norm),
)

ROUTER = "mlp.router"
ROUTER_TENSORS = (
    Tensor("mlp.router.weight", "router", ("experts", "hidden")),
    Tensor("mlp.router.bias", "router_bias", ("experts",), lambda c: c.router_bias),
)
# `{}` stands for the number of an expert.
EXPERT_TENSORS = (
    Tensor("mlp.experts.{}.gate_proj.weight", "experts.{}.gate", ("expert", "hidden")),
    Tensor("mlp.experts.{}.up_proj.weight", "experts.{}.up", ("expert", "hidden")),
    Tensor("mlp.experts.{}.down_proj.weight", "experts.{}.down", ("hidden", "expert")),
    Tensor("mlp.experts.{}.gate_proj.bias", "experts.{}.gate_bias", ("expert",), lambda c: c.mlp_bias),
    Tensor("mlp.experts.{}.up_proj.bias", "experts.{}.up_bias", ("expert",), lambda c: c.mlp_bias),
    Tensor("mlp.experts.{}.down_proj.bias", "experts.{}.down_bias", ("hidden",), lambda c: c.mlp_bias),
)

# The matrices of a Llama block, see `groups`.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def groups(config: ModelConfig, layer: int) -> tuple[tuple[str, ...], ...]:
    """The matrices of one block in the order of use; those of one group read the same input.

    The router and every expert are groups of their own: an expert reads the tokens that come to it.
    """
    if config.sparse(layer):
        experts = [f"mlp.experts.{expert}." for expert in range(config.n_experts)]
        pairs = (((at + "gate_proj", at + "up_proj"), (at + "down_proj",)) for at in experts)
        return (*GROUPS[:2], (ROUTER,), *(group for pair in pairs for group in pair))
    return (
        GROUPS[0],
        GROUPS[1],
        ("mlp.gate_proj", "mlp.up_proj") if config.gated else ("mlp.up_proj",),
        ("mlp.down_proj",),
    )


def leaders(config: ModelConfig, layer: int) -> dict[str, str]:
    """Each matrix of a block -> the first of its group, under which what they read is known."""
    return {name: group[0] for group in groups(config, layer) for name in group}


# Tensors that old checkpoints carry along and that the description already determines (fnmatch patterns).
IGNORABLE = (
    "model.layers.*.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.layers.*.self_attn.masked_bias",
)


@dataclass(frozen=True)
class Expected:
    """A tensor that a checkpoint of one network must hold."""

    name: str  # canonical
    native: str  # name in the native decoder
    shape: tuple[int, ...]


def expected_tensors(config: ModelConfig) -> list[Expected]:
    """Every tensor of the described network in the order of use; the head only where it is not tied."""
    hidden = config.hidden_size
    expected = [Expected(EMBEDDING, "embed", (config.vocab_size, hidden))]
    if config.positions == "learned":
        rows = config.max_position + config.position_offset
        expected.append(Expected(POSITIONS, "positions", (rows, hidden)))
    for layer in range(config.n_layers):
        expected += layer_tensors(config, layer)
    expected.append(Expected(FINAL_NORM, "norm", (hidden,)))
    if config.norm_bias:
        expected.append(Expected(FINAL_NORM_BIAS, "norm_bias", (hidden,)))
    if not config.tied:
        expected.append(Expected(HEAD, "head", (config.vocab_size, hidden)))
    return expected


def layer_tensors(config: ModelConfig, layer: int) -> list[Expected]:
    """Those of one layer."""
    sizes = _sizes(config)

    def expected(table: Iterable[Tensor], expert: int | str = "") -> Iterator[Expected]:
        for tensor in table:
            if tensor.present is None or tensor.present(config):
                yield Expected(
                    f"model.layers.{layer}.{tensor.name.format(expert)}",
                    f"layers.{layer}.{tensor.native.format(expert)}",
                    tuple(sizes[symbol] for symbol in tensor.shape),
                )

    tensors = [*expected(ATTENTION_TENSORS), *expected(MLP_NORMS)]
    if not config.sparse(layer):
        return [*tensors, *expected(MLP_TENSORS)]
    tensors += expected(ROUTER_TENSORS)
    for expert in range(config.n_experts):
        tensors += expected(EXPERT_TENSORS, expert)
    return tensors


def _sizes(config: ModelConfig) -> dict[str, int]:
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "experts": config.n_experts,
        "expert": config.expert_size,
        "q": q,
        "kv": kv,
        "heads": config.n_heads,
        "q_norm": q if config.qk_norm_whole else config.head_dim,
        "k_norm": kv if config.qk_norm_whole else config.head_dim,
    }
