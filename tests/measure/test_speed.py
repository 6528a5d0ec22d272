"""The bytes and operations behind the bounds, counted by hand; the times only for their sign."""

from types import SimpleNamespace

import pytest

from lowbit.engine import LanguageModel, load
from lowbit.errors import RequestError, UnsupportedError
from lowbit.measure import bench, first_token_seconds
from lowbit.measure.speed import (
    kv_bytes_per_token,
    measure_decode,
    measure_prefill,
    prefill_multiply_adds,
    weight_bytes_per_token,
)


def matrix(rows, columns, n_bytes):
    return SimpleNamespace(out_features=rows, in_features=columns, nbytes=n_bytes)


def model(tied, windows=(0, 0)):
    weights = {
        "model.embed_tokens.weight": matrix(100, 8, 400),
        "model.layers.0.mlp.up_proj.weight": matrix(16, 8, 64),
        "model.layers.1.mlp.up_proj.weight": matrix(16, 8, 64),
    }
    if not tied:
        weights["lm_head.weight"] = matrix(100, 8, 800)
    config = SimpleNamespace(
        vocab_size=100, n_layers=2, n_kv_heads=3, head_dim=4, windows=windows, eos_ids=()
    )
    return LanguageModel(
        SimpleNamespace(
            config=config,
            tokenizer=None,
            decoder=None,
            context=8,
            bits_per_weight=4.0,
            nbytes=1,
            weights=weights,
            cache=lambda positions: SimpleNamespace(nbytes=positions * 2 * 70),
        )
    )


def test_weight_bytes():
    assert weight_bytes_per_token(model(tied=True)) == 400 + 64 + 64  # the head is the embedding
    assert weight_bytes_per_token(model(tied=False)) == 800 + 64 + 64  # one row of the embedding


def test_multiply_adds():
    layers = 2 * 16 * 8
    assert prefill_multiply_adds(model(tied=True), 10) == 10 * layers + 800
    assert prefill_multiply_adds(model(tied=False), 10) == 10 * layers + 800


def test_kv_bytes():
    one_layer_one_position = 70  # bytes, as the cache says
    assert kv_bytes_per_token(model(True), 10) == 2 * 10 * one_layer_one_position
    assert kv_bytes_per_token(model(True, windows=(4, 0)), 10) == (4 + 10) * one_layer_one_position


def test_times_are_measured(tiny_model):
    loaded = load(tiny_model)
    assert measure_prefill(loaded, 16, 1) > 0
    assert measure_decode(loaded, 4, 1) > 0


def test_first_token_of_a_fresh_process(tiny_model):
    assert 0 < first_token_seconds(str(tiny_model), repeats=1) < 30


def test_refusals(tiny_model, tmp_path):
    with pytest.raises(RequestError, match="repeats=0"):
        bench(str(tiny_model), repeats=0)
    with pytest.raises(UnsupportedError, match="none"):
        first_token_seconds(str(tmp_path / "none.gguf"), repeats=1)
