"""Rotation speeds against transformers' ROPE_INIT_FUNCTIONS, over many parameter sets."""

import copy
import itertools

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.config import from_transformers
from lowbit.model.rope import SCALINGS, inverse_frequencies

# Both sides round theta ** exponent and its inverse to float32; the power functions may differ by a unit
# in the last place each, and interpolation adds as much: 4 units of 2**-23 in all.
TOLERANCE = 4 * 2.0**-23


def config_dict(parameters: dict, head_dim: int = 64, max_position: int = 4096, **more) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": head_dim,
        "max_position_embeddings": max_position,
        "rope_parameters": parameters,
        **more,
    }


def expected(data: dict, context: int | None = None) -> tuple[np.ndarray, float]:
    """The same from transformers; seq_len is what it sees once a sequence fills the context."""
    config = transformers.LlamaConfig(**{k: v for k, v in data.items() if k != "model_type"})
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        return rotary.inv_freq.numpy(), rotary.attention_scaling
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=context)
    return frequencies.numpy(), factor


def check(data: dict, context: int = 4096) -> None:
    frequencies, factor = inverse_frequencies(from_transformers(data), context)
    theirs, their_factor = expected(data, context)
    assert frequencies.dtype == np.float32 and frequencies.shape == theirs.shape
    np.testing.assert_allclose(frequencies, theirs, rtol=TOLERANCE, atol=0)
    assert factor == pytest.approx(their_factor, rel=1e-12)


@pytest.mark.parametrize("theta", [100.0, 1e4, 1e5, 5e5, 1e6, 5e6])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 128, 256])
def test_default_and_linear(theta, head_dim):
    check(config_dict({"rope_type": "default", "rope_theta": theta}, head_dim))
    for factor in (1.0, 2.0, 2.5, 8.0):
        check(config_dict({"rope_type": "linear", "factor": factor, "rope_theta": theta}, head_dim))


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("factor", [1.0, 2.0, 4.5])
@pytest.mark.parametrize("context", [1, 512, 4096, 4097, 6000, 8192, 100000])
def test_dynamic(theta, factor, context):
    for head_dim in (16, 64, 96, 128):
        data = config_dict({"rope_type": "dynamic", "factor": factor, "rope_theta": theta}, head_dim)
        check(data, context)


def test_dynamic_is_plain_within_the_original_maximum():
    plain = inverse_frequencies(from_transformers(config_dict({"rope_type": "default"})), 4096)[0]
    data = config_dict({"rope_type": "dynamic", "factor": 4.0})
    config = from_transformers(data)
    for context in (1, 4095, 4096):
        np.testing.assert_array_equal(inverse_frequencies(config, context)[0], plain)
    assert (inverse_frequencies(config, 4097)[0][1:] < plain[1:]).all()
    assert config.max_context == 16384


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
@pytest.mark.parametrize("low, high", [(1.0, 4.0), (0.5, 2.0), (2.0, 16.0)])
@pytest.mark.parametrize("original", [512, 8192])
def test_llama3(theta, factor, low, high, original):
    for head_dim in (48, 64, 128):
        parameters = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
            "rope_theta": theta,
        }
        check(config_dict(parameters, head_dim, max_position=131072))


YARN = [
    {},
    {"attention_factor": 1.0},
    {"attention_factor": 0.7},
    {"beta_fast": 16.0, "beta_slow": 2.0},
    {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": True},
    {"mscale": 1.0, "mscale_all_dim": 0.5},
    {"mscale": 0.707, "mscale_all_dim": 0.707},
    {"mscale": 1.2},
    {"truncate": False},
    {"truncate": False, "beta_fast": 8.0, "beta_slow": 0.25},
]


@pytest.mark.parametrize("extra", YARN, ids=lambda extra: "-".join(extra) or "plain")
@pytest.mark.parametrize("theta", [1e4, 1e6, 150000.0])
@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
def test_yarn(extra, theta, factor):
    for head_dim, original in itertools.product((32, 64, 128), (64, 4096, 32768)):
        parameters = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "rope_theta": theta,
            **extra,
        }
        check(config_dict(parameters, head_dim, max_position=32768))


def test_yarn_takes_the_factor_from_the_maxima():
    parameters = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}
    config = from_transformers(config_dict(parameters))
    assert config.rope.factor == 4.0


def test_a_factor_per_frequency_reproduces_llama3():
    parameters = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 5e5,
    }
    scaled = inverse_frequencies(from_transformers(config_dict(parameters, max_position=131072)), 8192)[0]
    plain = inverse_frequencies(from_transformers(config_dict({"rope_theta": 5e5})), 8192)[0]
    divisors = [float(f) for f in plain / scaled]
    stored = {"rope_type": "factors", "factors": divisors, "rope_theta": 5e5}
    again, factor = inverse_frequencies(from_transformers(config_dict(stored)), 8192)
    np.testing.assert_allclose(again, scaled, rtol=TOLERANCE)
    assert factor == 1.0


def test_old_and_new_spelling_agree():
    newer = config_dict({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4})
    older = config_dict({}, rope_theta=5e4, rope_scaling={"type": "linear", "factor": 2.0})
    both = config_dict({"rope_type": "default", "rope_theta": 5e4}, rope_scaling=newer["rope_parameters"])
    del older["rope_parameters"]
    assert from_transformers(newer).rope == from_transformers(older).rope == from_transformers(both).rope
    theirs = expected({k: v for k, v in older.items()})
    np.testing.assert_allclose(
        inverse_frequencies(from_transformers(older), 64)[0], theirs[0], rtol=TOLERANCE
    )


def test_theta_defaults_to_the_family():
    data = config_dict({})
    del data["rope_parameters"]
    assert from_transformers(data).rope.theta == 10000.0
    smollm3 = {**data, "model_type": "smollm3"}
    assert from_transformers(smollm3).rope.theta == transformers.SmolLM3Config.default_theta
    bitnet = {**data, "model_type": "bitnet", "head_dim": 32, "num_key_value_heads": 2}
    assert from_transformers(bitnet).rope.theta == transformers.BitNetConfig.default_theta


@pytest.mark.parametrize("share", [1.0, 0.75])
@pytest.mark.parametrize("original", [1024, 4096])
@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_longrope(kind, original, share):
    """Divisors of the original context, others beyond it; Phi-3 has written the scaling under three names."""
    count = int(64 * share) // 2
    parameters = {
        "rope_type": kind,
        "short_factor": [1 + 0.1 * i for i in range(count)],
        "long_factor": [1 + 0.7 * i for i in range(count)],
    }
    more = {"partial_rotary_factor": share, "original_max_position_embeddings": original}
    data = config_dict(parameters, **more, rope_scaling=parameters, rope_theta=10000.0) | {
        "model_type": "phi3"
    }
    del data["rope_parameters"], data["head_dim"]
    data |= {"hidden_size": 256, "max_position_embeddings": 8192}
    ours = from_transformers(data)
    data["rope_scaling"] = {**parameters, "rope_type": "longrope"}
    config = transformers.Phi3Config(**{k: v for k, v in data.items() if k != "model_type"})
    assert ours.rope.rotary_dim == 2 * count
    for context in (original, original + 1, 8192):
        theirs, their_factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=context)
        frequencies, factor = inverse_frequencies(ours, context)
        np.testing.assert_allclose(frequencies, theirs.numpy(), rtol=TOLERANCE, atol=0)
        assert factor == pytest.approx(their_factor, rel=1e-12)
    assert not np.array_equal(inverse_frequencies(ours, original)[0], frequencies)


@pytest.mark.parametrize(
    "settings, full, local",
    [
        ({}, 1e6, 1e4),
        ({"rope_theta": 5e5, "rope_local_base_freq": 300.0}, 5e5, 300.0),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 1e6, 1e4),
        ({"rope_parameters": {"full_attention": {"rope_theta": 9e5}, "sliding_attention": None}}, 9e5, 1e4),
    ],
)
def test_rotations_by_layer_type(settings, full, local):
    """Gemma 3: as transformers reads what it wrote before and after version 5."""
    data = {k: v for k, v in config_dict({}).items() if k != "rope_parameters"} | settings
    theirs = transformers.Gemma3TextConfig(
        **{k: v for k, v in copy.deepcopy(data).items() if k != "model_type"}
    )
    config = from_transformers(data | {"model_type": "gemma3_text"})
    for rope, kind, theta in (
        (config.rope, "full_attention", full),
        (config.rope_local, "sliding_attention", local),
    ):
        assert rope.theta == theta == theirs.rope_parameters[kind]["rope_theta"]
        assert rope.kind == theirs.rope_parameters[kind].get("rope_type", "default")
        assert rope.factor == theirs.rope_parameters[kind].get("factor", 1.0)
    with pytest.raises(CheckpointError, match="rope_parameters"):
        from_transformers(data | {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 3.0}})


UNSUPPORTED = [
    ({"rope_type": "longrope", "short_factor": [1.0], "beta_fast": 3.0}, "beta_fast"),
    ({"type": "su", "factor": 2.0}, "'su'"),
    ({"rope_type": ["linear"]}, "rope scaling"),
    ({"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"full_attention": {"rope_type": "default"}}, "differ by layer type"),
]


@pytest.mark.parametrize("parameters, named", UNSUPPORTED)
def test_unsupported_settings_are_named(parameters, named):
    with pytest.raises(UnsupportedError, match=named):
        from_transformers(config_dict(parameters))


DAMAGED = [
    ({"rope_type": "linear"}, "factor"),
    ({"rope_type": "linear", "factor": 0.0}, "factor"),
    ({"rope_type": "linear", "factor": float("nan")}, "factor"),
    ({"rope_type": "linear", "factor": "2"}, "factor"),
    ({"rope_type": "dynamic", "factor": 0.5}, "factor"),
    ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 77}, "original_max"),
    ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor"),
    ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq"),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "original_max"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, "truncate"),
    ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rope_theta"),
    ({"rope_type": "default", "rope_theta": -1.0}, "rope_theta"),
    ({"rope_type": "default", "rope_theta": float("inf")}, "rope_theta"),
    ({"rope_type": "factors", "factors": [1.0]}, "factors"),
    ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "short_factor"),
    ({"rope_type": "su", "short_factor": [1.0] * 32, "long_factor": ["1.0"] * 32}, "long_factor"),
    ({"rope_type": "su", "short_factor": [1.0] * 32, "original_max_position_embeddings": 1}, "original_max"),
    ("linear", "object"),
]


@pytest.mark.parametrize("parameters, named", DAMAGED)
def test_damaged_settings_are_named(parameters, named):
    with pytest.raises(CheckpointError, match=named):
        from_transformers(config_dict(parameters))


def test_every_scaling_is_tried_here():
    assert set(SCALINGS) == {"default", "linear", "dynamic", "llama3", "yarn", "factors", "longrope"}
