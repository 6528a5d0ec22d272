"""What checkpoints of each family call their tensors, as tables: canonical stem -> where it is stored.

A stem is a name without `.weight` or `.bias`. What a table does not name is stored under its canonical
name. Sources: the modeling files of transformers 4.4x to 5.x and its conversion_mapping.py (names in the
file, not in the module, where the two differ); the tests save and read a model of every family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SINKS = "self_attn.sinks"  # a vector without a suffix
_SUFFIXES = {"weight": ".weight", "bias": ".bias"}


@dataclass(frozen=True)
class Row:
    """One place where a tensor may lie.

    stem: `{e}` stands for the number of an expert
    part: which rows of it, a key of sources.PARTS
    transposed: the matrix is stored [in, out]
    stacked: the experts lie behind each other in the first dimension
    suffixes: what ".weight" and ".bias" are called
    """

    stem: str
    part: str = "all"
    transposed: bool = False
    stacked: bool = False
    suffixes: Mapping[str, str] = field(default_factory=lambda: _SUFFIXES)


@dataclass(frozen=True)
class Names:
    """The names of one family.

    roots: what stands before every name but the head's; the first is written, an empty one is a model that
        was saved without its head
    layer: what stands between the root and a name of a layer, `{n}` its number
    around: embedding, final norm and head; `{root}` stands for the root
    inside: tensors of a layer that have other than their canonical names. Of several places the first that a
        checkpoint has is read, and the first of all is written
    ignored: patterns (fnmatch) of stored tensors that the description already determines
    sinks: the vector of attention sinks, suffix included
    complete: what the tables do not name does not exist
    """

    roots: tuple[str, ...] = ("model.", "")
    layer: str = "layers.{n}."
    around: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inside: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq", "*.self_attn.masked_bias")
    sinks: str = SINKS
    complete: bool = False

    def rows(self, stem: str) -> tuple[Row, ...]:
        """The places of a tensor of a layer; its own name unless another tensor of the family has that."""
        if stem in self.inside or self.complete:
            return self.inside.get(stem, ())
        taken = any(row.stem == stem for rows in self.inside.values() for row in rows)
        return () if taken else (Row(stem),)


AROUND = {
    "model.embed_tokens": ("{root}embed_tokens",),
    "model.embed_positions": ("{root}embed_positions",),
    "model.norm": ("{root}norm",),
    "lm_head": ("lm_head",),
}
# Stems of a layer in the order of use, experts last.
INSIDE = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "self_attn.attn_sub_norm",
    "self_attn.o_proj",
    "post_self_attn_norm",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.ffn_sub_norm",
    "mlp.down_proj",
    "post_mlp_norm",
    "mlp.router",
)
EXPERTS = ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "mlp.experts.{e}.down_proj")


def _rows(**stems: str) -> dict[str, tuple[Row, ...]]:
    """Plain renamings; two underscores stand for the dot in a canonical stem."""
    return {stem.replace("__", "."): (Row(stored),) for stem, stored in stems.items()}


# transformers 5 keeps the experts of a layer in one array; it writes one matrix for each, as before.
_BARE = {"weight": "", "bias": "_bias"}
_STACKED = {
    "mlp.experts.{e}.gate_proj": Row("mlp.experts.gate_up_proj", "first half", stacked=True, suffixes=_BARE),
    "mlp.experts.{e}.up_proj": Row("mlp.experts.gate_up_proj", "second half", stacked=True, suffixes=_BARE),
    "mlp.experts.{e}.down_proj": Row("mlp.experts.down_proj", stacked=True, suffixes=_BARE),
}


def _experts(router: tuple[str, ...], **stems: str) -> dict[str, tuple[Row, ...]]:
    rows = {f"mlp.experts.{{e}}.{name}": (Row(stem),) for name, stem in stems.items()}
    return {
        "mlp.router": tuple(Row(stem) for stem in router),
        **{stem: (*rows.get(stem, (Row(stem),)), row) for stem, row in _STACKED.items()},
    }


def _gpt_oss(name: str, part: str) -> tuple[Row, ...]:
    """Floats lie [experts, in, out]; in MXFP4, blocks [experts, out, in / 32, 16], their scales beside."""
    blocks = {"weight": "_blocks", "bias": "_bias"}
    return (
        Row(f"mlp.experts.{name}", part, transposed=True, stacked=True, suffixes=_BARE),
        Row(f"mlp.experts.{name}", part, stacked=True, suffixes=blocks),
    )


_GEMMA = Names(
    inside=_rows(
        post_self_attn_norm="post_attention_layernorm",
        post_attention_layernorm="pre_feedforward_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
    )
)

# Family -> its names; a family that is not here uses the canonical names.
NAMES: dict[str, Names] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Names(
        inside={
            **{f"self_attn.{p}_proj": (Row("self_attn.qkv_proj", f"{p} of qkv"),) for p in ("q", "k", "v")},
            "mlp.gate_proj": (Row("mlp.gate_up_proj", "first half"),),
            "mlp.up_proj": (Row("mlp.gate_up_proj", "second half"),),
        }
    ),
    "olmo2": Names(
        inside=_rows(
            post_self_attn_norm="post_attention_layernorm", post_mlp_norm="post_feedforward_layernorm"
        )
    ),
    "gpt2": Names(
        roots=("transformer.", ""),
        layer="h.{n}.",
        around={
            "model.embed_tokens": ("{root}wte",),
            "model.embed_positions": ("{root}wpe",),
            "model.norm": ("{root}ln_f",),
        },
        inside={
            **{
                f"self_attn.{p}_proj": (Row("attn.c_attn", f"{p} of qkv", transposed=True),)
                for p in ("q", "k", "v")
            },
            "self_attn.o_proj": (Row("attn.c_proj", transposed=True),),
            "mlp.up_proj": (Row("mlp.c_fc", transposed=True),),
            "mlp.down_proj": (Row("mlp.c_proj", transposed=True),),
            **_rows(input_layernorm="ln_1", post_attention_layernorm="ln_2"),
        },
        ignored=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
    ),
    "opt": Names(
        roots=("model.decoder.", "decoder."),
        around={"model.norm": ("{root}final_layer_norm",)},
        inside=_rows(
            self_attn__o_proj="self_attn.out_proj",
            input_layernorm="self_attn_layer_norm",
            post_attention_layernorm="final_layer_norm",
            mlp__up_proj="fc1",
            mlp__down_proj="fc2",
        ),
    ),
    "gpt_neox": Names(
        roots=("gpt_neox.", ""),
        around={
            "model.embed_tokens": ("{root}embed_in",),
            "model.norm": ("{root}final_layer_norm",),
            "lm_head": ("embed_out", "lm_head"),
        },
        inside={
            **{
                f"self_attn.{p}_proj": (Row("attention.query_key_value", f"{p} by head"),)
                for p in ("q", "k", "v")
            },
            **_rows(
                self_attn__o_proj="attention.dense",
                mlp__up_proj="mlp.dense_h_to_4h",
                mlp__down_proj="mlp.dense_4h_to_h",
            ),
        },
        ignored=("*.attention.bias", "*.attention.masked_bias", "*.attention.rotary_emb.inv_freq"),
    ),
    "mixtral": Names(
        inside=_experts(
            ("block_sparse_moe.gate", "mlp.gate"),
            gate_proj="block_sparse_moe.experts.{e}.w1",
            up_proj="block_sparse_moe.experts.{e}.w3",
            down_proj="block_sparse_moe.experts.{e}.w2",
        )
    ),
    "qwen3_moe": Names(inside=_experts(("mlp.gate",))),
    "olmoe": Names(inside=_experts(("mlp.gate",))),
    "gpt_oss": Names(
        inside={
            "mlp.experts.{e}.gate_proj": _gpt_oss("gate_up_proj", "even"),
            "mlp.experts.{e}.up_proj": _gpt_oss("gate_up_proj", "odd"),
            "mlp.experts.{e}.down_proj": _gpt_oss("down_proj", "all"),
        }
    ),
}
