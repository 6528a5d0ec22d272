"""The families of decoders that lowbit runs, as data.

A family is one row of `FAMILIES`: which biases, norms, windows and activation its layers have, where its
config.json says so, and what an absent field means. A new family is a new row (and, if it brings a tensor
or an operation that no row has yet, a new line in tensors.py and in the decoder).

Sources: the configuration and modeling files of transformers 4.4x to 5.x for each `model_type`; the
tests hold every row against them.
"""

from __future__ import annotations

from lowbit.model.family import Experts, Family

_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

_GEMMA = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "tie_word_embeddings": True,
}

_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
    "rope_theta": 150000.0,
}

# Every head has its own keys, of hidden_size / num_attention_heads.
_UNGROUPED = frozenset({"num_key_value_heads", "head_dim"})

FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        # Llama 1-3, SmolLM2, TinyLlama and everything else that uses the class.
        Family(
            name="llama",
            architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
            attention_bias="field",
            mlp_bias="field",
            defaults={**_COMMON, "max_position_embeddings": 2048},
        ),
        Family(
            name="mistral",
            architectures=("MistralForCausalLM",),
            window="all",
            defaults={
                **_COMMON,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
        ),
        Family(
            name="qwen2",
            architectures=("Qwen2ForCausalLM",),
            attention_bias="qkv",
            window="upper",
            defaults={
                **_COMMON,
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
        ),
        Family(
            name="qwen3",
            architectures=("Qwen3ForCausalLM",),
            attention_bias="field",
            qk_norm="head",
            window="upper",
            defaults={
                **_COMMON,
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
        ),
        Family(
            name="smollm3",
            architectures=("SmolLM3ForCausalLM",),
            attention_bias="field",
            mlp_bias="field",
            window="no_rope",
            rope_layers="field",
            defaults={
                **_COMMON,
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "rope_theta": 2000000.0,
                "tie_word_embeddings": True,
                "no_rope_layer_interval": 4,
            },
        ),
        # BitNet b1.58: the network around ternary weights; how weights are stored is the matrix's business.
        Family(
            name="bitnet",
            architectures=("BitNetForCausalLM",),
            attention_bias="field",
            sub_norm=True,
            defaults={
                **_COMMON,
                "hidden_act": "relu2",
                "max_position_embeddings": 2048,
                "num_key_value_heads": 5,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
            },
        ),
        Family(
            name="gemma",
            architectures=("GemmaForCausalLM",),
            attention_bias="field",
            norm_offset=1.0,
            scaled_embedding=True,
            defaults={**_GEMMA, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16},
            activations={"gelu": "gelu_tanh"},  # what the first files say, and the class corrects
            unread=frozenset({"hidden_activation"}),
        ),
        Family(
            name="gemma2",
            architectures=("Gemma2ForCausalLM",),
            attention_bias="field",
            norm_place="sandwich",
            norm_offset=1.0,
            scaled_embedding=True,
            window="pattern",
            attention_scale="query_pre_attn_scalar",
            softcaps="both",
            names={"hidden_act": "hidden_activation"},
            defaults={
                **_GEMMA,
                "hidden_activation": "gelu_pytorch_tanh",
                "num_key_value_heads": 4,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
                "sliding_window_pattern": 2,
                "final_logit_softcapping": 30.0,
                "attn_logit_softcapping": 50.0,
            },
            unread=frozenset({"hidden_act"}),
        ),
        # Text only: its attention caps no scores, whatever attn_logit_softcapping says, so that must be null.
        Family(
            name="gemma3_text",
            architectures=("Gemma3ForCausalLM",),
            attention_bias="field",
            qk_norm="head",
            norm_place="sandwich",
            norm_offset=1.0,
            scaled_embedding=True,
            window="pattern",
            rotary="local",
            attention_scale="query_pre_attn_scalar",
            softcaps="logits",
            names={"hidden_act": "hidden_activation"},
            defaults={
                **_GEMMA,
                "hidden_activation": "gelu_pytorch_tanh",
                "max_position_embeddings": 131072,
                "num_key_value_heads": 4,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
                "sliding_window_pattern": 6,
                "rope_theta": 1000000.0,
                "rope_local_base_freq": 10000.0,
            },
            fixed={"attn_logit_softcapping": None},
            unread=frozenset({"hidden_act"}),
        ),
        Family(
            name="phi3",
            architectures=("Phi3ForCausalLM",),
            window="all",
            rotary="partial",
            defaults={
                **_COMMON,
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "sliding_window": None,
                "partial_rotary_factor": 1.0,
            },
        ),
        Family(
            name="olmo2",
            architectures=("Olmo2ForCausalLM",),
            attention_bias="field",
            qk_norm="whole",
            norm_place="post",
            defaults={**_COMMON, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        ),
        Family(
            name="gpt2",
            architectures=("GPT2LMHeadModel",),
            attention_bias="always",
            mlp_bias="always",
            norm="layer",
            gated=False,
            positions="learned",
            attention_scale="field",
            inner=4,
            names={
                "hidden_size": "n_embd",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "max_position_embeddings": "n_positions",
                "intermediate_size": "n_inner",
                "hidden_act": "activation_function",
                "rms_norm_eps": "layer_norm_epsilon",
            },
            defaults={
                "n_positions": 1024,
                "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5,
                "scale_attn_weights": True,
                "tie_word_embeddings": True,
            },
            unread=_UNGROUPED,
        ),
        # Post-norm (350m) and projected embeddings are other networks.
        Family(
            name="opt",
            architectures=("OPTForCausalLM",),
            attention_bias="field",
            mlp_bias="field",
            norm="layer",
            gated=False,
            positions="learned",
            position_offset=2,
            norm_eps=1e-5,
            names={
                "intermediate_size": "ffn_dim",
                "hidden_act": "activation_function",
                "attention_bias": "enable_bias",
                "mlp_bias": "enable_bias",
            },
            defaults={
                "max_position_embeddings": 2048,
                "activation_function": "relu",
                "enable_bias": True,
                "tie_word_embeddings": True,
            },
            fixed={
                "do_layer_norm_before": True,
                "_remove_final_layer_norm": False,
                "layer_norm_elementwise_affine": True,
                "word_embed_proj_dim": "hidden_size",
            },
            unread=_UNGROUPED,
        ),
        # GPT-NeoX and Pythia.
        Family(
            name="gpt_neox",
            architectures=("GPTNeoXForCausalLM",),
            attention_bias="field",
            mlp_bias="always",
            norm="layer",
            gated=False,
            parallel="field",
            rotary="partial",
            names={
                "rms_norm_eps": "layer_norm_eps",
                "rope_theta": "rotary_emb_base",
                "partial_rotary_factor": "rotary_pct",
            },
            defaults={
                "max_position_embeddings": 2048,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-5,
                "attention_bias": True,
                "use_parallel_residual": True,
                "rotary_emb_base": 10000.0,
                "rotary_pct": 0.25,
                "tie_word_embeddings": False,
            },
            unread=_UNGROUPED,
        ),
        Family(
            name="mixtral",
            architectures=("MixtralForCausalLM",),
            window="all",
            experts=Experts(count=8, per_token=2),
            defaults={
                **_COMMON,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1000000.0,
                "sliding_window": None,
            },
        ),
        Family(
            name="qwen3_moe",
            architectures=("Qwen3MoeForCausalLM",),
            attention_bias="field",
            qk_norm="head",
            window="switch",
            experts=Experts(128, 8, "moe_intermediate_size", renormalize="field", layers="steps"),
            defaults={
                **_COMMON,
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "sliding_window": 4096,
                "moe_intermediate_size": 768,
            },
        ),
        # Clipped queries, keys and values are in no published checkpoint that has this class.
        Family(
            name="olmoe",
            architectures=("OlmoeForCausalLM",),
            attention_bias="field",
            qk_norm="whole",
            experts=Experts(count=64, per_token=8, renormalize="field"),
            defaults={**_COMMON, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
            fixed={"clip_qkv": None},
        ),
        Family(
            name="gpt_oss",
            architectures=("GptOssForCausalLM",),
            attention_bias="field",
            mlp_bias="always",
            window="pattern",
            sinks=True,
            experts=Experts(
                count=128, per_token=4, order="topk_softmax", renormalize="never", router_bias=True
            ),
            activations={"silu": "swiglu_clamped"},
            defaults={
                **_COMMON,
                "attention_bias": True,
                "head_dim": 64,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "sliding_window": 128,
                "sliding_window_pattern": 2,
                "rope_theta": 150000.0,
                "rope_parameters": _GPT_OSS_ROPE,
            },
            fixed={"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
            unread=frozenset({"initial_context_length", "experts_per_token"}),
        ),
    )
}
