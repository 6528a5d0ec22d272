"""Published networks by their config.json, for the tests of plans."""

from lowbit.plan.network import Network, network_from


def llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, **more) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        **more,
    }


MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "sliding_window": None,
    "tie_word_embeddings": False,
}
# deepseek-ai/DeepSeek-V2-Lite's config.json: latent attention and experts.
DEEPSEEK_LITE = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_hidden_layers": 27,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 102400,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163840,
}
LLAMA_2_7B = llama(32, 4096, 11008, 32, 32, 32000)
LLAMA_2_70B = llama(80, 8192, 28672, 64, 8, 32000)
LLAMA_3_8B = llama(32, 4096, 14336, 32, 8, 128256, rope_theta=5e5)
SMOLLM2 = llama(30, 576, 1536, 9, 3, 49152, tie_word_embeddings=True)
RANDOM_1B = llama(22, 2048, 5632, 32, 4, 32000)


def network(config: dict, name: str = "") -> Network:
    return network_from(config, name)
