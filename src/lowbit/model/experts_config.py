"""What a config.json says about experts: how many, how large, how they are chosen, and in which layers."""

from __future__ import annotations

from typing import Any

from lowbit.model.family import Family
from lowbit.model.fields import Fields
from lowbit.model.layer_kinds import MAX_LAYERS

MAX_EXPERTS = 1 << 12
MAX_EXPERT_SIZE = 1 << 20


def read_experts(fields: Fields, family: Family, n_layers: int) -> dict[str, Any]:
    """Fields of ModelConfig; none for a family without experts."""
    row = family.experts
    if row is None:
        return {}
    given = [key for key in ("num_local_experts", "num_experts") if fields.raw(key) is not None]
    counts = [fields.integer(key, 1, MAX_EXPERTS) for key in given]
    if len(set(counts)) > 1:
        raise fields.fail("num_experts", counts[1], f"num_local_experts={counts[0]}, where both are given")
    count = counts[0] if counts else row.count
    per_token = fields.integer("num_experts_per_tok", 1, MAX_EXPERTS, default=row.per_token)
    if per_token > count:
        raise fields.fail("num_experts_per_tok", per_token, f"at most the number of experts, {count}")
    renormalize = row.renormalize == "always"
    if row.renormalize == "field":
        renormalize = fields.boolean("norm_topk_prob", default=False)
    return {
        "n_experts": count,
        "experts_per_token": per_token,
        "expert_size": fields.integer(row.size, 1, MAX_EXPERT_SIZE),
        "router_bias": row.router_bias,
        "router_order": row.order,
        "router_renormalize": renormalize,
        "sparse_layers": _sparse_layers(fields, row.layers, n_layers),
    }


def _sparse_layers(fields: Fields, kind: str, n_layers: int) -> tuple[bool, ...]:
    """decoder_sparse_step: every so many layers is sparse; mlp_only_layers: these are not."""
    if kind == "all":
        return (True,) * n_layers
    step = fields.integer("decoder_sparse_step", 1, MAX_LAYERS, default=1)
    dense = fields.items("mlp_only_layers", int, MAX_LAYERS) or []
    if any(not 0 <= layer < n_layers for layer in dense):
        raise fields.fail("mlp_only_layers", dense, f"layers from 0 to {n_layers - 1}")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(n_layers))
