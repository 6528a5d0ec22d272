"""What a network consists of, for counting: matrices, attention, vectors. From a config.json alone.

A network that lowbit runs is described by its ModelConfig, so its matrices are those that would be loaded.
One that it does not run (multi-head latent attention, DeepSeek) can be planned for other devices all the
same: its sizes are read from the usual keys, `runs` is false and `notes` say why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, LowbitError, UnsupportedError
from lowbit.model.config import ModelConfig, from_transformers
from lowbit.model.families import FAMILIES
from lowbit.model.json_file import read_json
from lowbit.model.tensors import EMBEDDING, HEAD, expected_tensors

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+?)(?:\.weight)?")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(\w+)")
# Matrices that read the same input and take one format together.
_ITEMS = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "qkv"),
    "self_attn.o_proj": "o",
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "gate_up"),
    "mlp.down_proj": "down",
}


@dataclass(frozen=True)
class Matrix:
    """Weights [out_features, in_features]; with `experts`, one of so many, of which tokens choose
    `active`.
    """

    name: str  # canonical, without `model.layers.N.` and `.weight`; experts: without their number
    out_features: int
    in_features: int
    item: str  # matrices of one item take one format
    experts: int = 0
    active: int = 0

    @property
    def weights(self) -> int:
        """Of one expert, or of the matrix."""
        return self.out_features * self.in_features

    @property
    def copies(self) -> int:
        return self.experts or 1


@dataclass(frozen=True)
class Layer:
    """matrices in order of use; window: latest positions that are seen, 0: all."""

    matrices: tuple[Matrix, ...]
    window: int = 0


@dataclass(frozen=True)
class Network:
    """Sizes of a decoder.

    latent: numbers that multi-head latent attention keeps per token and layer (r + d_rope); 0: keys and
        values
    value_dim: of a head's values where it differs from head_dim (latent attention), else head_dim
    vectors: float32 numbers of norms and biases; positions: rows of a table of learned positions
    runs: does lowbit run it; notes: what a reader of a plan should know
    """

    name: str
    family: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: tuple[Layer, ...]
    tied: bool
    max_context: int
    vectors: int = 0
    positions: int = 0
    latent: int = 0
    value_dim: int = 0
    gated: bool = True
    runs: bool = True
    notes: tuple[str, ...] = ()
    config: ModelConfig | None = field(default=None, compare=False, repr=False)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def matrix_weights(self) -> int:
        """Weights of all matrices of the layers, every expert counted."""
        return sum(m.weights * m.copies for layer in self.layers for m in layer.matrices)

    @property
    def embedding_weights(self) -> int:
        """Of the token embedding and, where it is not the same, of the output head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @cached_property
    def parameters(self) -> int:
        return self.matrix_weights + self.embedding_weights + self.vectors + self.positions * self.hidden

    def active_weights(self) -> int:
        """Matrix weights of the layers that one token meets."""
        return sum(
            m.weights * (m.active if m.experts else 1) for layer in self.layers for m in layer.matrices
        )

    def seen(self, context: int) -> int:
        """Keys that one query at `context` positions meets, summed over the layers."""
        return sum(min(context, layer.window) if layer.window else context for layer in self.layers)


def network_of(config: ModelConfig, name: str = "") -> Network:
    """The network that a ModelConfig describes."""
    matrices: list[dict[str, Matrix]] = [{} for _ in range(config.n_layers)]
    vectors = positions = 0
    for tensor in expected_tensors(config):
        if len(tensor.shape) == 1:
            vectors += tensor.shape[0]
            continue
        match = _LAYER.fullmatch(tensor.name)
        if match is None:
            if tensor.name not in (EMBEDDING, HEAD):
                positions += tensor.shape[0]
            continue
        layer, short = matrices[int(match[1])], match[2]
        expert = _EXPERT.fullmatch(short)
        if expert is None:
            layer[short] = Matrix(short, tensor.shape[0], tensor.shape[1], _ITEMS.get(short, short))
        elif int(expert[1]) == 0:
            short = f"mlp.experts.{expert[2]}"
            item = "experts." + _ITEMS.get(f"mlp.{expert[2]}", expert[2])
            rows, columns = tensor.shape
            layer[short] = Matrix(short, rows, columns, item, config.n_experts, config.experts_per_token)
    layers = tuple(
        Layer(tuple(found.values()), config.windows[number] if config.windows else 0)
        for number, found in enumerate(matrices)
    )
    return Network(
        name=name or config.family,
        family=config.family,
        hidden=config.hidden_size,
        intermediate=config.expert_size * config.experts_per_token
        if config.n_experts and all(map(config.sparse, range(config.n_layers)))
        else config.intermediate_size,
        heads=config.n_heads,
        kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        layers=layers,
        tied=config.tied,
        max_context=config.max_context,
        vectors=vectors,
        positions=positions,
        value_dim=config.head_dim,
        gated=config.gated,
        config=config,
    )


def network_from(config: Mapping[str, Any], name: str = "", where: str = "config.json") -> Network:
    """The network of a config.json's object.

    Raises UnsupportedError, which says what is known, for one that neither lowbit runs nor its usual keys
    describe.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where}: expected a JSON object, received {type(config).__name__}")
    nested = config.get("text_config")
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    try:
        return network_of(from_transformers(plain, where=where), name or str(config.get("model_type") or ""))
    except LowbitError as refusal:
        source = {**config, **nested} if isinstance(nested, Mapping) else config
        found = _by_keys(source, name)
        if found is None:
            known = ", ".join(sorted(FAMILIES))
            raise UnsupportedError(
                f"plan: {where}: {config.get('model_type') or config.get('architectures')!r} is not known "
                f"({refusal}) and has not the keys hidden_size, num_hidden_layers, num_attention_heads and "
                f"vocab_size; lowbit runs {known}, and any decoder with these keys can be planned"
            ) from refusal
        return replace(found, notes=(f"lowbit does not run it: {refusal}", *found.notes))


def _by_keys(config: Mapping[str, Any], name: str) -> Network | None:
    """Sizes by the usual keys of config.json, also of latent attention and experts; None if some lack."""

    def number(*keys: str, default: int | None = None) -> int | None:
        for key in keys:
            value = config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
        return default

    hidden, depth = number("hidden_size", "n_embd", "d_model"), number("num_hidden_layers", "n_layer")
    heads, vocab = number("num_attention_heads", "n_head"), number("vocab_size")
    if not hidden or not depth or not heads or not vocab:
        return None
    kv_heads = number("num_key_value_heads", default=heads) or heads
    head_dim = number("head_dim", default=hidden // heads) or hidden // heads
    inner = number("intermediate_size", "n_inner", default=4 * hidden) or 4 * hidden
    rank, rope = number("kv_lora_rank", default=0) or 0, number("qk_rope_head_dim", default=0) or 0
    notes = ["sizes are read from the usual keys; norms and biases are not counted"]
    if rank:
        nope = number("qk_nope_head_dim", default=head_dim) or head_dim
        value_dim, head_dim = number("v_head_dim", default=nope) or nope, nope + rope
        attention = _latent_attention(
            hidden, heads, rank, rope, nope, value_dim, number("q_lora_rank", default=0) or 0
        )
        notes.append(f"latent attention keeps {rank} + {rope} numbers per token and layer")
    else:
        value_dim = head_dim
        attention = (
            Matrix("self_attn.q_proj", heads * head_dim, hidden, "qkv"),
            Matrix("self_attn.k_proj", kv_heads * head_dim, hidden, "qkv"),
            Matrix("self_attn.v_proj", kv_heads * head_dim, hidden, "qkv"),
            Matrix("self_attn.o_proj", hidden, heads * head_dim, "o"),
        )
    experts = number("n_routed_experts", "num_local_experts", "num_experts", default=0) or 0
    active = number("num_experts_per_tok", default=0) or 0
    small = number("moe_intermediate_size", default=inner) or inner
    shared = (number("n_shared_experts", default=0) or 0) * small
    first_sparse = number("first_k_dense_replace", default=0) or 0
    layers = []
    for layer in range(depth):
        sparse = bool(experts) and layer >= first_sparse
        mlp = _mlp(hidden, shared if sparse else inner, "mlp.shared" if sparse else "mlp")
        if sparse:
            mlp += (
                Matrix("mlp.router", experts, hidden, "mlp.router"),
                Matrix("mlp.experts.gate_proj", small, hidden, "experts.gate_up", experts, active),
                Matrix("mlp.experts.up_proj", small, hidden, "experts.gate_up", experts, active),
                Matrix("mlp.experts.down_proj", hidden, small, "experts.down", experts, active),
            )
        layers.append(Layer(attention + mlp))
    return Network(
        name=name or str(config.get("model_type", "")),
        family=str(config.get("model_type", "unknown")),
        hidden=hidden,
        intermediate=small * active + shared if experts else inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        layers=tuple(layers),
        tied=config.get("tie_word_embeddings") is True,
        max_context=number("max_position_embeddings", "n_positions", default=1 << 17) or 1 << 17,
        latent=rank + rope if rank else 0,
        value_dim=value_dim,
        runs=False,
        notes=tuple(notes),
    )


def _mlp(hidden: int, inner: int, name: str) -> tuple[Matrix, ...]:
    if not inner:
        return ()
    return (
        Matrix(f"{name}.gate_proj", inner, hidden, "gate_up"),
        Matrix(f"{name}.up_proj", inner, hidden, "gate_up"),
        Matrix(f"{name}.down_proj", hidden, inner, "down"),
    )


def _latent_attention(
    hidden: int, heads: int, rank: int, rope: int, nope: int, value_dim: int, q_rank: int
) -> tuple[Matrix, ...]:
    """DeepSeek-V2's matrices (arXiv:2405.04434, section 2.1)."""
    wide = heads * (nope + rope)
    queries = (
        (
            Matrix("self_attn.q_a_proj", q_rank, hidden, "qkv"),
            Matrix("self_attn.q_b_proj", wide, q_rank, "q_b"),
        )
        if q_rank
        else (Matrix("self_attn.q_proj", wide, hidden, "qkv"),)
    )
    return (
        *queries,
        Matrix("self_attn.kv_a_proj_with_mqa", rank + rope, hidden, "qkv"),
        Matrix("self_attn.kv_b_proj", heads * (nope + value_dim), rank, "kv_b"),
        Matrix("self_attn.o_proj", hidden, heads * value_dim, "o"),
    )


def read_network(path: str | Path) -> Network:
    """The network of a config.json, of a directory that has one, or of a checkpoint (GGUF)."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json":
        try:
            return network_from(read_json(file), path.parent.name if path.suffix else path.name, str(file))
        except OSError as error:
            raise CheckpointError(
                f"plan {path}: {error.strerror}; give a directory with a config.json"
            ) from error
    from lowbit.model.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return network_of(checkpoint.config, path.stem)
