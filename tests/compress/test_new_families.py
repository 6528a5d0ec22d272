"""From a saved transformers model of each family to quantized files that run: rounding, GPTQ and AWQ.

The text of these random networks is random tokens, so that calibration and test are of one kind.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("lowbit._native")

from lowbit.compress import quantize_checkpoint
from lowbit.compress.choose import resolve_auto
from lowbit.formats.auto import Auto
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.loader import load_model
from lowbit.model.reference import reference_logits
from lowbit.packed import PackedMatrix
from lowbit.quantize import awq as search

from ..model import tiny_models

FAMILIES = ("gemma2", "gemma3", "phi3", "olmo2", "gpt2", "opt", "neox")
WINDOWS = np.random.default_rng(7).integers(0, tiny_models.SIZES["vocab_size"], (24, 24))
TEST = np.random.default_rng(8).integers(0, tiny_models.SIZES["vocab_size"], (6, 24))
METHODS = ("rtn", "gptq", "awq")


def probabilities(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def divergence(wanted, given):
    """Mean KL(wanted, given) over positions, in nats."""
    a, b = probabilities(wanted), probabilities(given)
    return float((np.exp(a) * (a - b)).sum(-1).mean())


def native(model, tokens):
    return model.decoder.logits(tokens.astype(np.int32), [model.cache(len(tokens))], [len(tokens)], all=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_models_of_every_family_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "STEPS", 4)
    model = tiny_models.build(tiny_models.CASES[name])
    folder = tiny_models.save(model, tmp_path / "model")
    wanted = np.stack([tiny_models.logits(model, row.tolist()) for row in TEST])
    even = np.zeros(wanted.shape)
    lost = {}
    for method in METHODS:
        out = tmp_path / method
        calibration = None if method == "rtn" else WINDOWS
        report = quantize_checkpoint(folder, "int5-g32", out, method=method, calibration=calibration)
        assert 5 < report["bits_per_weight"] < 8
        loaded = load_model(out, activations="int16", kv_bits=16)
        coded = [
            m for m in loaded.weights.values() if isinstance(m, PackedMatrix) and m.terms[0].kind == "codes"
        ]
        assert len(coded) >= 6 * loaded.config.n_layers
        given = np.stack([native(loaded, row) for row in TEST])
        with open_checkpoint(out) as checkpoint:
            weights = {tensor: checkpoint.read(tensor) for tensor in checkpoint.names()}
            reference = reference_logits(checkpoint.config, weights, TEST[0], kv_dtype=np.float16)
        np.testing.assert_allclose(given[0], reference, atol=5e-3 * np.abs(reference).max(), rtol=0)
        lost[method] = divergence(wanted, given)

    assert max(lost.values()) < 0.2 * divergence(wanted, even)
    assert lost["gptq"] < 2.5 * lost["rtn"]
    assert lost["awq"] < 2.5 * lost["rtn"]


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mixtral"])
def test_bits_are_chosen_for_every_family(name, tmp_path):
    """Sensitivities by gradients and by measuring: the budget is met, and the sum foretells the whole."""
    folder = tiny_models.save(tiny_models.build(tiny_models.CASES[name]), tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        for sensitivity in ("fisher", "kl"):
            auto = Auto(choices="int4-g32,int6-g32", bits=5.6, sensitivity=sensitivity, samples=4)
            scheme, report = resolve_auto(auto, checkpoint, WINDOWS[:4])
            assert 5.2 < report["bits_per_weight"] <= 5.6
            assert 0 < report["achieved_kl"] < 10 * report["predicted_kl"]
            position = scheme.format_for("model.embed_positions.weight")
            assert (
                position.float_type
                == scheme.format_for("model.layers.0.mlp.router.weight").float_type
                == "fp16"
            )
