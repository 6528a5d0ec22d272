"""config.json -> ModelConfig: what is read, what is refused, and what an error says."""

import dataclasses
import json

import pytest

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.config import from_transformers
from lowbit.model.families import FAMILIES

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def of(family: str, **settings) -> dict:
    data = {**BASE, "model_type": family, "architectures": [FAMILIES[family].architectures[0]]}
    return {**data, **settings}


def test_smollm2_as_published():
    published = {
        **BASE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "mlp_bias": False,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
    }
    config = from_transformers(published)
    assert config.head_dim == 64
    assert config.attention_scale == 0.125
    assert config.rope.theta == 1e5
    assert config.rope.kind == "default"
    assert config.tied
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm or config.sub_norm)
    assert config.windows == (0,) * 30
    assert config.rope_layers == (True,) * 30
    assert config.bos_ids == (1,)
    assert config.eos_ids == (2,)
    assert config.max_context == 8192
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tied = False


def test_smollm3_as_published():
    data = of(
        "smollm3", pretraining_tp=2, max_window_layers=28, use_sliding_window=False, sliding_window=None
    )
    del data["tie_word_embeddings"]  # omitted where it has the default of the class
    config = from_transformers(data)
    assert config.tied
    assert [layer for layer, rotated in enumerate(config.rope_layers) if not rotated] == [
        3,
        7,
        11,
        15,
        19,
        23,
        27,
    ]


def test_absent_and_null_fields():
    config = from_transformers({**BASE, "num_key_value_heads": None, "head_dim": None, "eos_token_id": None})
    assert config.n_kv_heads == 9
    assert config.head_dim == 64
    assert config.eos_ids == ()
    without = {
        k: v for k, v in BASE.items() if k not in ("tie_word_embeddings", "rms_norm_eps", "hidden_act")
    }
    config = from_transformers(without)
    assert (config.tied, config.norm_eps, config.activation) == (False, 1e-6, "silu")


def test_architecture_or_model_type_alone_will_do():
    for key in ("architectures", "model_type"):
        assert from_transformers({k: v for k, v in BASE.items() if k != key}).family == "llama"


def test_biases():
    both = from_transformers({**BASE, "attention_bias": True, "mlp_bias": True})
    assert both.qkv_bias
    assert both.o_bias
    assert both.mlp_bias
    qwen2 = from_transformers(of("qwen2"))
    assert qwen2.qkv_bias
    assert not qwen2.o_bias


def test_end_tokens_of_both_files():
    config = from_transformers({**BASE, "eos_token_id": [2, 7]}, {"eos_token_id": [9, 2], "temperature": 0.6})
    assert config.eos_ids == (2, 7, 9)
    assert from_transformers(BASE, {}).eos_ids == (2,)
    with pytest.raises(CheckpointError, match="generation_config"):
        from_transformers(BASE, {"eos_token_id": 1 << 40})
    with pytest.raises(CheckpointError, match="generation_config"):
        from_transformers(BASE, [])


def test_mistral_windows():
    assert from_transformers(of("mistral", sliding_window=512)).windows == (512,) * 30
    assert from_transformers(of("mistral", sliding_window=None)).windows == (0,) * 30
    assert from_transformers(of("mistral")).windows == (4096,) * 30  # absent: the default of the class
    with pytest.raises(UnsupportedError, match="layer_types"):
        from_transformers(of("mistral", layer_types=["full_attention", "sliding_attention"] * 15))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_windows(family):
    off = {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 10}
    assert from_transformers(of(family, **off)).windows == (0,) * 30
    on = {**off, "use_sliding_window": True}
    assert from_transformers(of(family, **on)).windows == (0,) * 10 + (64,) * 20
    kinds = ["sliding_attention"] + ["full_attention"] * 29
    assert from_transformers(of(family, **on, layer_types=kinds)).windows == (64,) + (0,) * 29
    with pytest.raises(CheckpointError, match="layer_types"):
        from_transformers(of(family, **off, layer_types=kinds))


def test_generic_size_limits():
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "intermediate_size",
        "max_position_embeddings",
    ):
        for value in (0, -1, 1 << 60, 10**400, 1.5, True, "12", [], float("nan"), float("inf")):
            with pytest.raises(CheckpointError, match=key):
                from_transformers({**BASE, key: value})
        with pytest.raises(CheckpointError, match=key):
            from_transformers({**BASE, "num_attention_heads": 1, "num_key_value_heads": 1, key: -(10**9)})


REFUSED = [
    ({"model_type": "mamba"}, UnsupportedError, "llama.*mistral.*qwen3"),
    (
        {"architectures": ["LlamaForSequenceClassification"]},
        UnsupportedError,
        "LlamaForSequenceClassification",
    ),
    ({"architectures": ["MistralForCausalLM"]}, UnsupportedError, "MistralForCausalLM"),
    ({"architectures": [3]}, CheckpointError, "architectures"),
    ({"model_type": 3}, CheckpointError, "model_type"),
    ({"model_type": None, "architectures": None}, CheckpointError, "neither"),
    ({"hidden_act": "quick_gelu"}, UnsupportedError, "gelu_pytorch_tanh"),
    ({"hidden_act": 3}, CheckpointError, "hidden_act"),
    ({"num_key_value_heads": 2}, CheckpointError, "divisor"),
    ({"num_attention_heads": 10, "num_key_value_heads": 5}, CheckpointError, "hidden_size"),
    ({"head_dim": 63}, CheckpointError, "even"),
    ({"head_dim": 1 << 20}, CheckpointError, "head_dim"),
    ({"rms_norm_eps": -1.0}, CheckpointError, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, CheckpointError, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, CheckpointError, "tie_word_embeddings"),
    ({"attention_bias": "qkv"}, CheckpointError, "attention_bias"),
    ({"eos_token_id": 49152}, CheckpointError, "eos_token_id"),
    ({"eos_token_id": [2, -1]}, CheckpointError, "eos_token_id"),
    ({"bos_token_id": "1"}, CheckpointError, "bos_token_id"),
    ({"layer_types": ["full_attention"] * 29}, CheckpointError, "layer_types"),
    ({"layer_types": ["linear_attention"] * 30}, UnsupportedError, "linear_attention"),
    ({"layer_types": ["sliding_attention"] * 30}, CheckpointError, "layer_types"),
    ({"partial_rotary_factor": 0.25}, UnsupportedError, "partial_rotary_factor"),
    ({"quantization_config": {"quant_method": "aqlm", "bits": 4}}, UnsupportedError, "gptq"),
    ({"quantization_config": []}, UnsupportedError, "quant_method"),
    # unknown fields that other networks use to change the result
    ({"attn_logit_softcapping": 50.0}, UnsupportedError, "attn_logit_softcapping"),
    ({"final_logit_softcapping": 30.0}, UnsupportedError, "final_logit_softcapping"),
    ({"residual_multiplier": 0.22}, UnsupportedError, "residual_multiplier"),
    ({"logits_scaling": 8.0}, UnsupportedError, "logits_scaling"),
    ({"rope_interleaved": True}, UnsupportedError, "rope_interleaved"),
    ({"sliding_window": 4096}, UnsupportedError, "sliding_window"),
    ({"num_experts": 8}, UnsupportedError, "num_experts"),
    ({"use_qk_norm": True}, UnsupportedError, "use_qk_norm"),
    ({"qkv_bias": True}, UnsupportedError, "qkv_bias"),
    ({"scale_emb": 12}, UnsupportedError, "scale_emb"),
]


@pytest.mark.parametrize("change, error, named", REFUSED, ids=lambda value: str(value)[:40])
def test_refused(change, error, named):
    with pytest.raises(error, match=named) as caught:
        from_transformers({**BASE, **change}, where="a/config.json")
    assert "a/config.json" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("change", [c for c, _, _ in REFUSED[25:]], ids=lambda value: next(iter(value)))
def test_unknown_fields_are_fine_when_neutral(change):
    for neutral in (None, False, 0, 1.0, "", []):
        assert from_transformers({**BASE, **dict.fromkeys(change, neutral)}).ignored == ()


def test_fields_that_change_nothing_are_listed():
    config = from_transformers(
        {**BASE, "finetuned_by": "somebody", "_name_or_path": "x", "torch_dtype": "float32"}
    )
    assert config.ignored == ("finetuned_by",)


def test_a_nested_bomb_is_an_error_of_one_line():
    deep: list = []
    for _ in range(500):
        deep = [deep]
    for key in ("hidden_size", "layer_types", "eos_token_id", "rope_scaling", "logits_scaling"):
        with pytest.raises((CheckpointError, UnsupportedError), match=key) as caught:
            from_transformers({**BASE, key: deep})
        assert len(str(caught.value)) < 500


def test_no_rope_layers():
    flags = [1, 0] * 20
    config = from_transformers(of("smollm3", no_rope_layers=flags))  # longer than the layers, as documented
    assert config.rope_layers == tuple(flag == 1 for flag in flags[:30])
    for bad in ([1] * 29, [2] * 30, ["1"] * 30, 3):
        with pytest.raises(CheckpointError, match="no_rope_layers"):
            from_transformers(of("smollm3", no_rope_layers=bad))
    with pytest.raises(CheckpointError, match="no_rope_layer_interval"):
        from_transformers(of("smollm3", no_rope_layer_interval=0))


def test_bitnet():
    config = from_transformers(of("bitnet", hidden_act="relu2"))
    assert config.sub_norm
    assert config.activation == "relu2"
    with pytest.raises(CheckpointError, match="head_dim"):
        from_transformers(of("bitnet", head_dim=32))


def test_not_an_object():
    for wrong in ([], "llama", 3, None):
        with pytest.raises(CheckpointError, match="JSON object"):
            from_transformers(wrong)


def test_a_file_written_as_floats_reads_the_same():
    floats = {
        k: float(v) if type(v) is int and k != "rope_theta" and "token" not in k else v
        for k, v in BASE.items()
    }
    assert from_transformers(json.loads(json.dumps(floats))) == from_transformers(BASE)
