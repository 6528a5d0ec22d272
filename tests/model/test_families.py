"""Every row of the table of families against the class of transformers that it describes."""

import dataclasses

import numpy as np
import pytest
import transformers

from lowbit.model.config import from_transformers
from lowbit.model.families import ACTIVATIONS, FAMILIES
from lowbit.model.reference import reference_logits
from lowbit.model.tensors import expected_tensors

from . import tiny_models

# Reduction lengths are below 200 and logits below 20: float32 sums in another order differ by some 1e-5.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=tiny_models.CASES, ids=str)
def network(request):
    case = tiny_models.CASES[request.param]
    model = tiny_models.build(case)
    return case, model, from_transformers(tiny_models.config_dict(model))


def test_every_family_has_a_case():
    kinds = {getattr(transformers, case.kind + "Config").model_type for case in tiny_models.CASES.values()}
    assert kinds == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_class(family):
    theirs = transformers.AutoConfig.for_model(family)
    for key, value in FAMILIES[family].defaults.items():
        if key == "rope_theta":
            assert value == theirs.default_theta
        elif family in ("qwen2", "qwen3") and key == "sliding_window":
            assert theirs.sliding_window is None  # the class clears it: use_sliding_window is off
            assert type(theirs)(use_sliding_window=True).sliding_window == value
        else:
            assert value == getattr(theirs, key), key
    published = getattr(transformers, FAMILIES[family].architectures[0])
    assert published.config_class is type(theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_config_means_what_the_class_means(family):
    """Only the sizes that lowbit insists on are given; everything else falls back on both sides."""
    sizes = {
        "vocab_size": 100,
        "hidden_size": 640,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 160,  # a multiple of every default of num_key_value_heads
    }
    theirs = type(transformers.AutoConfig.for_model(family))(**sizes)
    ours = from_transformers({"model_type": family, **sizes})
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 4)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.n_kv_heads == theirs.num_key_value_heads
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.activation == ACTIVATIONS[theirs.hidden_act]
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


def test_tensors_are_exactly_those_of_the_network(network):
    _, model, config = network
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {tensor.name: tensor.shape for tensor in expected_tensors(config)} == theirs


@pytest.mark.parametrize("length", [1, 40])
def test_logits(network, length):
    _, model, config = network
    ids = tiny_models.token_ids(length)
    theirs = tiny_models.logits(model, ids)
    ours = reference_logits(config, tiny_models.weights(model), ids)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    exact = reference_logits(config, tiny_models.weights(model), ids, dtype=np.float64)
    np.testing.assert_allclose(ours, exact, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_tolerance_would_catch_a_mistake(network):
    """Every parameter matters: zeroing any one tensor moves the logits far beyond the tolerance."""
    _, model, config = network
    ids = tiny_models.token_ids(12)
    weights = tiny_models.weights(model)
    right = reference_logits(config, weights, ids)
    for tensor in expected_tensors(config):
        if tensor.native.endswith("k_bias") and not any(config.rope_layers):
            continue  # without rotation a key bias shifts all scores alike
        wrong = reference_logits(config, {**weights, tensor.name: 0 * weights[tensor.name]}, ids)
        assert np.abs(wrong - right).max() > 30 * TOLERANCE, tensor.name


@pytest.mark.parametrize("name", ["mistral", "qwen2-windows", "qwen3-windows", "smollm3-windows"])
def test_windows_matter(name):
    case = tiny_models.CASES[name]
    model = tiny_models.build(case)
    ids = tiny_models.token_ids(40)
    config = from_transformers(tiny_models.config_dict(model))
    wider = tuple(window + 1 if window else 0 for window in config.windows)
    off_by_one = reference_logits(dataclasses.replace(config, windows=wider), tiny_models.weights(model), ids)
    assert np.abs(off_by_one - tiny_models.logits(model, ids)).max() > 30 * TOLERANCE


SCALINGS = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "truncate": False},
    {**tiny_models.LLAMA3, "original_max_position_embeddings": 32},
]


@pytest.mark.parametrize("parameters", SCALINGS, ids=lambda p: p["rope_type"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "smollm3"])
def test_positions_beyond_the_original_maximum(parameters, kind):
    """A sequence that fills the context exactly: there dynamic scaling means the same on both sides."""
    case = tiny_models.CASES[kind]
    settings = {"rope_parameters": {"rope_theta": 1000.0, **parameters}, "max_position_embeddings": 32}
    model = tiny_models.build(case, **settings)
    config = from_transformers(tiny_models.config_dict(model))
    ids = tiny_models.token_ids(60)
    assert config.max_context >= 60 or parameters["rope_type"] not in ("linear", "dynamic")
    ours = reference_logits(config, tiny_models.weights(model), ids, context=60)
    np.testing.assert_allclose(ours, tiny_models.logits(model, ids), atol=TOLERANCE, rtol=TOLERANCE)
