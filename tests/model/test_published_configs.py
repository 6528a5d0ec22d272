"""config.json as published with models of each family: what is read from it.

Each dict is the file of the named repository without keys that every family shares (dtype, version, cache).
"""

import numpy as np
import pytest

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.config import from_transformers
from lowbit.model.rope import inverse_frequencies
from lowbit.model.tensors import expected_tensors

GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
PHI3_MINI_128K = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [1.07, *[60.0] * 47], "short_factor": [1.1] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
PHI4_MINI = {
    **PHI3_MINI_128K,
    "full_attn_mod": 1,
    "hidden_size": 3072,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": [1, *[32.5] * 47], "short_factor": [1.0] * 48, "type": "longrope"},
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
OLMO2_1B = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
OPT_125M = {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "prefix": "</s>",
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
PYTHIA_70M = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}

# Parameters of each as its model card counts them (a tied head once).
PARAMETERS = [
    (GEMMA2_2B, 2_614_341_888),
    (GEMMA3_1B, 999_885_952),
    (PHI3_MINI_128K, 3_821_079_552),
    (PHI4_MINI, 3_836_021_760),
    (OLMO2_1B, 1_484_916_736),
    (GPT2, 124_439_808),
    (OPT_125M, 125_239_296),
    (PYTHIA_70M, 70_426_624),
]


@pytest.mark.parametrize(
    "data, count", PARAMETERS, ids=lambda value: value["model_type"] if isinstance(value, dict) else ""
)
def test_parameters_are_those_of_the_model_card(data, count):
    total = 0
    for tensor in expected_tensors(from_transformers(data)):
        size = 1
        for n in tensor.shape:
            size *= n
        total += size
    assert total == count


def test_gemma():
    config = from_transformers(GEMMA2_2B)
    assert (config.norm_place, config.norm_offset, config.activation) == ("sandwich", 1.0, "gelu_tanh")
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert config.embedding_scale == 48.0
    assert config.attention_scale == 1 / 16
    assert config.windows == (4096, 0) * 13
    assert config.tied
    newer = from_transformers(GEMMA3_1B)
    assert newer.windows == ((512,) * 5 + (0,)) * 4 + (512,) * 2
    assert newer.local_layers == tuple(window > 0 for window in newer.windows)
    assert (newer.rope.theta, newer.rope_local.theta) == (1e6, 1e4)
    assert [newer.rope_of(layer).theta for layer in (4, 5)] == [1e4, 1e6]
    assert (newer.attention_softcap, newer.logit_softcap, newer.qk_norm) == (0, 0, True)
    assert newer.eos_ids == (1, 106)
    first = {**GEMMA2_2B, "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu"}
    first = {k: v for k, v in first.items() if "softcapping" not in k and k != "sliding_window"}
    del first["query_pre_attn_scalar"]
    assert from_transformers(first).activation == "gelu_tanh"  # as the class corrects it
    assert from_transformers(first).norm_place == "pre"


def test_phi3():
    config = from_transformers(PHI3_MINI_128K)
    assert config.rope.kind == "longrope"
    assert (config.rope.original_max_position, config.max_context) == (4096, 131072)
    assert config.rope.factor == 32
    assert config.windows == (262144,) * 32
    mini = from_transformers(PHI4_MINI)
    assert (mini.head_dim, mini.rope.rotary_dim, mini.tied) == (128, 96, True)
    short = {**PHI3_MINI_128K, "rope_scaling": None, "max_position_embeddings": 4096, "sliding_window": 2047}
    assert from_transformers(short).rope.kind == "default"


def test_others():
    olmo = from_transformers(OLMO2_1B)
    assert (olmo.norm_place, olmo.qk_norm, olmo.qk_norm_whole) == ("post", True, True)
    gpt2 = from_transformers(GPT2)
    assert (gpt2.intermediate_size, gpt2.activation, gpt2.gated) == (3072, "gelu_tanh", False)
    assert (gpt2.positions, gpt2.position_offset, gpt2.max_context) == ("learned", 0, 1024)
    assert (gpt2.rope.rotary_dim, any(gpt2.rope_layers)) == (0, False)
    opt = from_transformers(OPT_125M)
    assert (opt.position_offset, opt.norm, opt.norm_eps, opt.activation) == (2, "layer", 1e-5, "relu")
    assert opt.qkv_bias and opt.o_bias and opt.mlp_bias
    neox = from_transformers(PYTHIA_70M)
    assert (neox.parallel, neox.rope.rotary_dim, neox.activation, neox.tied) == (True, 16, "gelu", False)
    assert from_transformers({**PYTHIA_70M, "hidden_act": "gelu_fast"}).activation == "gelu_tanh"


@pytest.mark.parametrize("data", [GPT2, OPT_125M, PYTHIA_70M], ids=lambda data: data["model_type"])
def test_families_without_groups_do_not_read_them(data):
    plain = from_transformers(data)
    assert from_transformers({**data, "num_key_value_heads": 4, "head_dim": 6}) == plain


@pytest.mark.parametrize(
    "data, change, named",
    [
        (OPT_125M, {"do_layer_norm_before": False, "hidden_size": 1024}, "do_layer_norm_before"),  # 350m
        (OPT_125M, {"word_embed_proj_dim": 512}, "word_embed_proj_dim"),
        (OPT_125M, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),  # Galactica
        (OPT_125M, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3_1B, {"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditional"),
        (PHI4_MINI, {"lm_head_bias": True}, "lm_head_bias"),
        (OLMO2_1B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_variants_that_are_other_networks_are_refused(data, change, named):
    with pytest.raises(UnsupportedError, match=named):
        from_transformers({**data, **change})


HOSTILE = [None, -1, 0, 3, 10**400, "x", "", [], [1], {}, {"a": {}}, True, float("nan"), float("inf"), 1e-300]


@pytest.mark.parametrize("data", [data for data, _ in PARAMETERS], ids=lambda data: data["model_type"])
def test_any_damaged_field_is_read_or_named(data):
    """Every field in turn holds something else, those of rotations too: a description or a line of error."""
    cases = [{**data, key: value} for key in data for value in HOSTILE]
    for scaling in ("rope_scaling", "rope_parameters"):
        given = dict(data.get(scaling) or {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0})
        cases += [{**data, scaling: {**given, key: value}} for key in given for value in HOSTILE]
        cases += [{**data, scaling: {"full_attention": value, "sliding_attention": {}}} for value in HOSTILE]
    for case in cases:
        try:
            config = from_transformers(case)
        except (CheckpointError, UnsupportedError) as error:
            assert len(str(error)) < 600
            continue
        for rope in {config.rope, config.rope_local} - {None}:
            frequencies, factor = inverse_frequencies(config, 50, rope)
            assert np.isfinite(frequencies).all() and np.isfinite(factor), case
