"""Small random checkpoints of every family, made with transformers; for tests only."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers

from .canonical import canonical

torch.set_num_threads(1)  # these products are too small to share
transformers.utils.logging.disable_progress_bar()

# Sizes that every family shares: grouped queries, a vocabulary and widths that are no powers of two.
SIZES = {
    "vocab_size": 270,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# What families without grouped queries or with names of their own set instead.
RENAMED = {
    "GPT2": {"num_key_value_heads": None, "intermediate_size": "n_inner"},
    "OPT": {"num_key_value_heads": None, "intermediate_size": "ffn_dim"},
    "GPTNeoX": {"num_key_value_heads": None},
}
CAUSAL = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class Case:
    """One network: its configuration class and what it sets besides SIZES."""

    name: str
    kind: str  # class name in transformers without Config / ForCausalLM
    settings: dict = field(default_factory=dict)


CASES = {
    case.name: case
    for case in (
        Case("llama", "Llama"),
        Case("llama-tied", "Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
        Case("llama-biases", "Llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5}),
        Case("llama-head-dim", "Llama", {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 4}),
        Case("llama-gelu", "Llama", {"hidden_act": "gelu_pytorch_tanh"}),
        Case(
            "llama3",
            "Llama",
            {
                "rope_parameters": {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 32},
                "eos_token_id": [2, 5],
            },
        ),
        Case("mistral", "Mistral", {"sliding_window": 9, "head_dim": 32}),
        Case("mistral-full", "Mistral", {"sliding_window": None}),
        Case("qwen2", "Qwen2", {"tie_word_embeddings": True}),
        Case(
            "qwen2-windows",
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        ),
        Case("qwen3", "Qwen3", {"head_dim": 32}),
        Case(
            "qwen3-windows",
            "Qwen3",
            {
                "head_dim": 16,
                "attention_bias": True,
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        Case("smollm3", "SmolLM3", {"no_rope_layers": [1, 0, 1]}),
        Case(
            "smollm3-windows",
            "SmolLM3",
            {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
        ),
        Case("bitnet", "BitNet", {"tie_word_embeddings": True}),
        Case("bitnet-untied", "BitNet", {"attention_bias": True}),
        Case("gemma", "Gemma", {"head_dim": 32}),
        Case(
            "gemma2",
            "Gemma2",
            {
                "head_dim": 32,
                "query_pre_attn_scalar": 20,
                "sliding_window": 9,
                "attn_logit_softcapping": 3.0,
                "final_logit_softcapping": 8.0,
            },
        ),
        Case(
            "gemma2-biases",
            "Gemma2",
            {
                "head_dim": 16,
                "attention_bias": True,
                "sliding_window": 5,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "tie_word_embeddings": False,
                "attn_logit_softcapping": None,
            },
        ),
        Case(
            "gemma3",
            "Gemma3Text",
            {
                "head_dim": 32,
                "query_pre_attn_scalar": 40,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                },
            },
        ),
        Case("phi3", "Phi3", {"num_key_value_heads": 6}),
        Case(
            "phi3-longrope",
            "Phi3",
            {
                "sliding_window": 20,
                "tie_word_embeddings": True,
                "hidden_size": 192,
                "original_max_position_embeddings": 8,
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1000.0,
                    "partial_rotary_factor": 0.75,
                    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1],
                    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5],
                },
            },
        ),
        Case("olmo2", "Olmo2"),
        Case("olmo2-biases", "Olmo2", {"attention_bias": True, "num_key_value_heads": 6}),
        Case("gpt2", "GPT2"),
        Case(
            "gpt2-unscaled",
            "GPT2",
            {
                "num_attention_heads": 12,
                "scale_attn_weights": False,
                "tie_word_embeddings": False,
                "activation_function": "gelu",
            },
        ),
        Case("opt", "OPT"),
        Case("opt-no-biases", "OPT", {"enable_bias": False, "activation_function": "gelu"}),
        Case("neox", "GPTNeoX", {"hidden_size": 192}),
        Case("mixtral", "Mixtral", {"num_local_experts": 4, "sliding_window": 9}),
        Case(
            "mixtral-one-of-three",
            "Mixtral",
            {"num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 32, "tie_word_embeddings": True},
        ),
        Case(
            "qwen3-moe",
            "Qwen3Moe",
            {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "head_dim": 32},
        ),
        Case(
            "qwen3-moe-mixed",
            "Qwen3Moe",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 96,
                "mlp_only_layers": [1],
                "norm_topk_prob": True,
                "attention_bias": True,
                "use_sliding_window": True,
                "sliding_window": 8,
            },
        ),
        Case(
            "qwen3-moe-steps",
            "Qwen3Moe",
            {
                "num_experts": 4,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 32,
                "decoder_sparse_step": 2,
                "head_dim": 16,
            },
        ),
        Case("olmoe", "Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
        Case(
            "olmoe-renormalized",
            "Olmoe",
            {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "num_key_value_heads": 6},
        ),
        Case(
            "gpt-oss",
            "GptOss",
            {
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "head_dim": 32,
                "sliding_window": 7,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                    "original_max_position_embeddings": 32,
                    "rope_theta": 1000.0,
                },
            },
        ),
        Case(
            "gpt-oss-defaults",
            "GptOss",
            {"num_local_experts": 3, "num_experts_per_tok": 3, "head_dim": 64, "attention_bias": False},
        ),
        Case(
            "neox-sequential",
            "GPTNeoX",
            {
                "use_parallel_residual": False,
                "attention_bias": False,
                "rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 1.0},
                "tie_word_embeddings": True,
            },
        ),
    )
}


def sizes(kind: str) -> dict:
    """SIZES in the words of one family."""
    names = RENAMED.get(kind, {})
    return {names.get(key) or key: value for key, value in SIZES.items() if names.get(key, key) is not None}


def build(case: Case, seed: int = 0, **settings: object) -> transformers.PreTrainedModel:
    """A float32 model with eager attention whose every parameter is random and matters.

    Weights have a standard deviation that keeps activations near one, norm gains lie around one, biases
    around zero, so that a forgotten bias, norm or window moves the logits far beyond a tolerance.
    """
    config_class = getattr(transformers, case.kind + "Config")
    model_class = getattr(transformers, CAUSAL.get(case.kind, case.kind + "ForCausalLM"))
    config = config_class(**{**sizes(case.kind), **copy.deepcopy(case.settings), **settings})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = model_class(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            elif any(part in name for part in ("embed_", "wte", "wpe")):
                parameter.normal_(0.0, 0.3)
            elif case.kind == "GPT2" and "lm_head" not in name:
                parameter.normal_(0.0, 1.5 * parameter.shape[0] ** -0.5)  # stored [in, out]
            else:  # stacked experts of gpt-oss are [experts, in, out], all others [.., out, in]
                inputs = parameter.shape[1 if case.kind == "GptOss" and parameter.ndim == 3 else -1]
                parameter.normal_(0.0, 1.5 * inputs**-0.5)
    return model


def save(
    model: transformers.PreTrainedModel, folder: Path, dtype: str = "float32", shard: str = "1GB"
) -> Path:
    """Write the model as a transformers directory in `dtype`, and round its own parameters alike.

    Only parameters are rounded: casting the whole model would round the rotation speeds too.
    """
    stored = copy.deepcopy(model).to(getattr(torch, dtype))
    stored.config.dtype = getattr(torch, dtype)
    stored.save_pretrained(folder, max_shard_size=shard)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    return folder


def weights(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """Parameters by canonical name, float32."""
    return canonical(model)


def config_dict(model: transformers.PreTrainedModel) -> dict:
    """What save_pretrained writes as config.json."""
    return json.loads(model.config.to_json_string(use_diff=True)) | {
        "architectures": [type(model).__name__],
        "model_type": model.config.model_type,
    }


def logits(model: transformers.PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """float32 [n, vocab_size], by transformers, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def greedy(model: transformers.PreTrainedModel, tokens: list[int], count: int) -> list[int]:
    """The `count` most likely next tokens, by transformers, recomputing everything for each."""
    ids = list(tokens)
    for _ in range(count):
        ids.append(int(np.argmax(logits(model, ids)[-1])))
    return ids[len(tokens) :]


def token_ids(count: int, seed: int = 0, vocab_size: int = SIZES["vocab_size"]) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()
