"""Every row of the table of families against the class of transformers that it describes."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from lowbit.model.config import from_transformers
from lowbit.model.families import FAMILIES
from lowbit.model.family import ACTIVATIONS
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
        if key in ("rope_theta", "rope_local_base_freq", "rotary_emb_base"):
            known = theirs.default_theta
            if isinstance(known, dict):
                known = known["global" if key == "rope_theta" else "local"]
            assert value == known
        elif key in ("partial_rotary_factor", "rotary_pct"):
            assert value == theirs.rope_parameters["partial_rotary_factor"]
        elif key == "sliding_window_pattern":
            kinds = type(theirs)(num_hidden_layers=13).layer_types
            assert [kind == "full_attention" for kind in kinds] == [(i + 1) % value == 0 for i in range(13)]
        elif family in ("qwen2", "qwen3", "qwen3_moe") and key == "sliding_window":
            assert theirs.sliding_window is None  # the class clears it: use_sliding_window is off
            assert type(theirs)(use_sliding_window=True).sliding_window == value
        else:
            assert value == getattr(theirs, key), key
    published = getattr(transformers, FAMILIES[family].architectures[0])
    assert published.config_class is type(theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_config_means_what_the_class_means(family):
    """Only the sizes that lowbit insists on are given; everything else falls back on both sides."""
    row = FAMILIES[family]
    sizes = {
        "vocab_size": 100,
        "hidden_size": 2560,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 160,  # a multiple of every default of num_key_value_heads
    }
    sizes = {row.names.get(key, key): value for key, value in sizes.items()}
    theirs = type(transformers.AutoConfig.for_model(family))(**sizes)
    ours = from_transformers({"model_type": family, **sizes})
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.n_kv_heads == getattr(theirs, "num_key_value_heads", 160)
    eps = getattr(theirs, row.names.get("rms_norm_eps", "rms_norm_eps"), None)
    assert ours.norm_eps == (torch.nn.LayerNorm(1).eps if eps is None else eps)
    assert ours.tied == theirs.tie_word_embeddings
    name = getattr(theirs, row.names.get("hidden_act", "hidden_act"))
    assert ours.activation == {**ACTIVATIONS, **row.activations}[name]
    if row.experts is not None:
        assert ours.n_experts == theirs.num_experts
        assert ours.experts_per_token == theirs.num_experts_per_tok
        assert ours.expert_size == getattr(theirs, row.experts.size)
        assert ours.router_renormalize == getattr(
            theirs, "norm_topk_prob", row.experts.order == "softmax_topk"
        )
    if ours.positions == "rope":
        ropes = theirs.rope_parameters
        assert ours.rope.theta == ropes.get("full_attention", ropes)["rope_theta"]
        assert ours.rope.rotary_dim == ours.head_dim * ropes.get("partial_rotary_factor", 1.0)
    if row.window == "pattern":
        kinds = tuple(kind == "sliding_attention" for kind in theirs.layer_types)
        assert tuple(window > 0 for window in ours.windows) == kinds
    if row.rotary == "local":
        assert ours.rope_local.theta == theirs.rope_parameters["sliding_attention"]["rope_theta"]


def test_tensors_are_exactly_those_of_the_network(network):
    _, model, config = network
    theirs = {name: values.shape for name, values in tiny_models.weights(model).items()}
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
    ids = tiny_models.token_ids(60 if config.n_experts else 12)  # every expert has a token
    weights = tiny_models.weights(model)
    right = reference_logits(config, weights, ids)
    for tensor in expected_tensors(config):
        if tensor.native.endswith("k_bias") and not any(config.rope_layers):
            continue  # without rotation a key bias shifts all scores alike
        wrong = reference_logits(config, {**weights, tensor.name: 0 * weights[tensor.name]}, ids)
        assert np.abs(wrong - right).max() > 30 * TOLERANCE, tensor.name


@pytest.mark.parametrize(
    "name",
    ["mistral", "qwen2-windows", "qwen3-windows", "smollm3-windows", "gemma2", "gemma3", "phi3-longrope"],
)
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
