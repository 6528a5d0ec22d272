"""config.json made from a description reads as the same description."""

from dataclasses import replace

import pytest

from lowbit.compress.description import transformers_fields
from lowbit.errors import CheckpointError
from lowbit.model.config import from_transformers

pytest.importorskip("torch")

from ..model import tiny_models

BASE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}
CASES = {
    "llama": {"model_type": "llama"},
    "llama tied with biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama head_dim": {"model_type": "llama", "head_dim": 32, "rope_theta": 5e5},
    "llama llama3": {"model_type": "llama", "rope_scaling": LLAMA3},
    "llama yarn": {"model_type": "llama", "rope_scaling": YARN},
    "llama linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama factors": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "factors", "factors": [1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]},
    },
    "llama gelu": {"model_type": "llama", "hidden_act": "gelu_pytorch_tanh"},
    "mistral": {"model_type": "mistral", "sliding_window": 32},
    "mistral full": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "bitnet": {"model_type": "bitnet", "hidden_act": "relu2"},
}


@pytest.mark.parametrize("name", CASES)
def test_fields_read_as_the_same_description(name):
    config = from_transformers(BASE | CASES[name])
    again = from_transformers(transformers_fields(config))
    assert replace(again, ignored=()) == replace(config, ignored=())


@pytest.mark.parametrize("name", tiny_models.CASES)
def test_every_family_is_described(name):
    config = from_transformers(tiny_models.config_dict(tiny_models.build(tiny_models.CASES[name])))
    again = from_transformers(transformers_fields(config))
    assert replace(again, ignored=()) == replace(config, ignored=())


def test_a_description_that_cannot_be_written_is_refused():
    config = from_transformers(BASE | CASES["llama"])
    with pytest.raises(CheckpointError, match="without changing attention_scale"):
        transformers_fields(replace(config, attention_scale=0.5))
