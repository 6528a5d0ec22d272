"""Views: the function stays for every family, and what they are for is there."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from lowbit.compress.description import write_description
from lowbit.compress.ksort import key_energy
from lowbit.compress.views import VIEWS
from lowbit.errors import UnsupportedError
from lowbit.formats import parse_format
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.config import from_transformers
from lowbit.model.json_file import read_json
from lowbit.model.reference import reference_logits
from lowbit.model.tensors import HEAD, expected_tensors
from lowbit.quantize.round_to_nearest import round_to_nearest

from . import networks


def logits(checkpoint):
    weights = {t.name: checkpoint.read(t.name) for t in expected_tensors(checkpoint.config)}
    for tensor in expected_tensors(checkpoint.config):
        assert weights[tensor.name].shape == tensor.shape == checkpoint.shape(tensor.name)
        assert weights[tensor.name].dtype == np.float32 and checkpoint.dtype(tensor.name) == "F32"
    assert set(checkpoint.names()) == set(weights)
    return reference_logits(checkpoint.config, weights, networks.tiny_models.token_ids(24))


def refused(name, config):
    """Would the view change the function?"""
    if name == "hadamard":
        return config.norm == "layer" or config.norm_place != "pre"
    return config.rope_local is not None or config.rope.kind in ("longrope", "yarn")


@pytest.mark.parametrize("case", networks.CASES)
@pytest.mark.parametrize("name", VIEWS)
def test_the_function_stays(name, case):
    checkpoint = networks.Memory(case)
    if refused(name, checkpoint.config):
        with pytest.raises(UnsupportedError, match=f"{name}: .*quantize without"):
            VIEWS[name].apply(checkpoint)
        return
    before = logits(checkpoint)
    with VIEWS[name].apply(checkpoint) as view:
        after = logits(view)
        moved = view.read("model.layers.1.self_attn.k_proj.weight")
        assert not np.allclose(moved, checkpoint.read("model.layers.1.self_attn.k_proj.weight"))
        np.testing.assert_array_equal(
            view.matrix("model.layers.1.self_attn.k_proj.weight").dequantize(), moved
        )
    np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max(), rtol=0)


def test_views_of_views():
    checkpoint = networks.Memory("smollm3")
    both = VIEWS["ksort"].apply(VIEWS["hadamard"].apply(checkpoint, seed=3))
    before = logits(checkpoint)
    np.testing.assert_allclose(logits(both), before, atol=2e-5 * np.abs(before).max(), rtol=0)


def test_a_tied_head_gets_its_own_weights():
    checkpoint = networks.Memory("qwen2")
    view = VIEWS["hadamard"].apply(checkpoint)
    assert checkpoint.config.tied and HEAD not in checkpoint.names()
    assert not view.config.tied and HEAD in view.names()
    assert VIEWS["hadamard"].apply(networks.Memory("llama")).names().count(HEAD) == 1


def test_outliers_of_the_stream_are_spread():
    """Channels that are loud everywhere cost a matrix its small weights; turned, they do not."""
    checkpoint = networks.Memory("llama")
    name = "model.layers.0.mlp.gate_proj.weight"
    checkpoint.weights["model.layers.0.post_attention_layernorm.weight"][:] = 1
    checkpoint.weights[name][:, [3, 50]] *= 30

    def error(weight):
        rest = weight - round_to_nearest(weight, parse_format("int4-g32")).dequantize()
        return float(np.vdot(rest, rest) / np.vdot(weight, weight))

    plain, turned = (c.read(name) for c in (checkpoint, VIEWS["hadamard"].apply(checkpoint)))
    assert error(turned) < 0.7 * error(plain)


@pytest.mark.parametrize("case", ["llama", "qwen3", "smollm3"])
def test_keys_are_sorted(case):
    view = VIEWS["ksort"].apply(networks.Memory(case))
    config = view.config
    half = config.head_dim // 2
    pairs = np.zeros(half)
    for layer, rotated in enumerate(config.rope_layers):
        energy = key_energy(view, layer)
        if rotated:
            pairs += (energy[:, :half] + energy[:, half:]).sum(0)
        else:
            assert (np.diff(energy, axis=1) <= 1e-9).all()
    assert (np.diff(pairs) <= 1e-9).all()


@pytest.mark.parametrize(
    "views, case",
    [
        (("hadamard", "ksort"), "llama-tied"),
        (("hadamard", "ksort"), "phi3"),
        (("ksort",), "neox"),
        (("ksort",), "neox-sequential"),
        (("ksort",), "olmo2"),
        (("ksort",), "gpt2"),
    ],
)
def test_the_description_of_a_view_is_written(views, case, tmp_path):
    folder = networks.tiny_models.save(
        networks.tiny_models.build(networks.tiny_models.CASES[case]), tmp_path / "model"
    )
    with open_checkpoint(folder) as checkpoint:
        view = checkpoint
        for name in views:
            view = VIEWS[name].apply(view)
        target = tmp_path / "out"
        target.mkdir()
        write_description(view, target, {"quant_method": "lowbit", "version": 1})
        read = from_transformers(
            read_json(target / "config.json"), read_json(target / "generation_config.json")
        )
    assert replace(read, ignored=()) == replace(view.config, ignored=())
    assert "hadamard" not in views or not read.tied


def test_what_cannot_be_reordered():
    checkpoint = networks.Memory("llama")
    for rope in (
        replace(checkpoint.config.rope, kind="yarn", factor=4.0),
        replace(checkpoint.config.rope, theta=1e12),
    ):
        checkpoint.config = replace(checkpoint.config, rope=rope)
        with pytest.raises(UnsupportedError, match="ksort"):
            VIEWS["ksort"].apply(checkpoint)
