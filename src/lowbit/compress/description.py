"""The files of a model directory beside its weights: config.json, generation_config.json, the tokenizer."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.config import ModelConfig, from_transformers
from lowbit.model.families import FAMILIES
from lowbit.model.family import Family
from lowbit.model.gguf_config import rotated_share
from lowbit.model.json_file import read_json
from lowbit.model.rope import SCALINGS, Rope

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_ACTIVATION_NAMES = {
    "silu": "silu",
    "relu2": "relu2",
    "gelu_tanh": "gelu_pytorch_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "swiglu_clamped": "silu",  # what gpt-oss calls it
}


def write_description(
    checkpoint: Checkpoint,
    folder: Path,
    quantization: dict[str, Any] | None,
    fields: dict[str, Any] | None = None,
) -> None:
    """Write everything but the weights and lowbit.json into `folder`.

    A directory's own files are copied, with `quantization` as quantization_config (None: without one) and
    `fields` set in config.json; those of a single file are made from what it says. A checkpoint without
    tokenizer gives a directory without one.
    """
    described = (checkpoint.path / "config.json").is_file()
    if not described:
        config = transformers_fields(checkpoint.config)
    else:
        config = read_json(checkpoint.path / "config.json")
        generation = checkpoint.path / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, folder / generation.name)
        # What a view may have changed: a head of its own, the order of rotary pairs.
        config["tie_word_embeddings"] = checkpoint.config.tied
        if checkpoint.config.rope.kind == "factors":
            scaling = _rope_scaling(checkpoint.config.rope) or {}
            config["rope_scaling"] = {"rope_theta": checkpoint.config.rope.theta, **scaling}
            config["rope_scaling"] |= _rotated_share(checkpoint.config)
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    write_json(folder / "config.json", config | (fields or {}))
    if described and (checkpoint.path / "tokenizer.json").is_file():
        for name in _TOKENIZER_FILES:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, folder / name)
        return
    tokenizer = checkpoint.tokenizer()
    if tokenizer is not None:
        tokenizer.save(folder)


def transformers_fields(config: ModelConfig) -> dict[str, Any]:
    """A config.json from which `from_transformers` reads `config` again."""
    family = FAMILIES[config.family]
    fields: dict[str, Any] = {
        "architectures": [family.architectures[0]],
        "model_type": family.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "hidden_act": _ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_ids[0] if config.bos_ids else None,
        "eos_token_id": list(config.eos_ids),
    }
    if not family.norm_eps:
        fields["rms_norm_eps"] = config.norm_eps
    if family.attention_bias == "field":
        fields["attention_bias"] = config.o_bias
    if family.mlp_bias == "field":
        fields["mlp_bias"] = config.mlp_bias
    if family.parallel == "field":
        fields["use_parallel_residual"] = config.parallel
    if family.softcaps != "none":
        fields["final_logit_softcapping"] = config.logit_softcap or None
    if family.softcaps == "both":
        fields["attn_logit_softcapping"] = config.attention_softcap or None
    if family.attention_scale == "query_pre_attn_scalar":
        fields["query_pre_attn_scalar"] = _scalar_of(config.attention_scale)
    elif family.attention_scale == "field":
        fields["scale_attn_weights"] = config.attention_scale != 1.0
    fields = {family.names.get(key, key): value for key, value in fields.items()}
    fields |= (
        _rotation_fields(config, family) | _layer_fields(config, family) | _expert_fields(config, family)
    )
    again = from_transformers(fields, where="config.json made from GGUF metadata")
    if replace(again, ignored=()) != replace(config, ignored=()):
        before, after = asdict(config), asdict(again)
        changed = ", ".join(key for key in before if key != "ignored" and before[key] != after[key])
        raise CheckpointError(
            f"write config.json: the description of this {config.family} model cannot be written without "
            f"changing {changed}; start from the transformers directory of the model"
        )
    return fields


def _scalar_of(scale: float) -> float:
    """The number whose power -0.5 is `scale`; an integer where there is one."""
    near = round(scale**-2)
    if near > 0 and near**-0.5 == scale:
        return near
    value = scale**-2
    return next(
        (v for v in (value, math.nextafter(value, 0), math.nextafter(value, 1e9)) if v**-0.5 == scale), value
    )


def _layer_fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Which layers are rotated, and which see a window."""
    window = max(config.windows, default=0)
    fields: dict[str, Any] = {}
    if family.rope_layers == "field":
        fields["no_rope_layers"] = [int(rotated) for rotated in config.rope_layers]
    if family.window == "none":
        return fields
    fields["sliding_window"] = window or None
    if family.window == "pattern":
        fields["sliding_window"] = window or 1  # unused where no layer slides, but it must be a number
    elif family.window != "all":
        fields["use_sliding_window"] = window > 0
    if family.window != "all":
        fields["layer_types"] = ["sliding_attention" if w else "full_attention" for w in config.windows]
    return fields


def _expert_fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family.experts is None:
        return {}
    fields: dict[str, Any] = {
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        family.experts.size: config.expert_size,
    }
    if family.experts.renormalize == "field":
        fields["norm_topk_prob"] = config.router_renormalize
    if family.experts.layers == "steps":
        fields["mlp_only_layers"] = [layer for layer in range(config.n_layers) if not config.sparse(layer)]
    return fields


def _rotation_fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family.positions == "learned":
        return {}
    if config.rope_local is not None:
        kinds = {"full_attention": config.rope, "sliding_attention": config.rope_local}
        return {
            "rope_parameters": {
                kind: {"rope_theta": rope.theta, **(_rope_scaling(rope) or {"rope_type": "default"})}
                for kind, rope in kinds.items()
            }
        }
    scaling = _rope_scaling(config.rope)
    if scaling is None and "rope_parameters" in family.defaults:
        scaling = {"rope_type": "default"}
    fields: dict[str, Any] = {family.names.get("rope_theta", "rope_theta"): config.rope.theta}
    if scaling and config.rope.kind == "longrope":
        fields["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    share = {family.names.get(key, key): value for key, value in _rotated_share(config).items()}
    return {**fields, "rope_scaling": scaling, **share}


def _rotated_share(config: ModelConfig) -> dict[str, float]:
    """partial_rotary_factor of a family that has one."""
    if FAMILIES[config.family].rotary != "partial":
        return {}
    return {"partial_rotary_factor": rotated_share(config.rope.rotary_dim, config.head_dim)}


def _rope_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    values = asdict(rope) | {
        "original_max_position_embeddings": rope.original_max_position,
        "short_factor": rope.factors,
        "long_factor": rope.long_factors,
    }
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    for key in sorted(SCALINGS[rope.kind]):
        if values[key] is not None:
            scaling[key] = list(values[key]) if isinstance(values[key], tuple) else values[key]
    return scaling


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
