"""Every family to GGUF and back, and from there to a quantized directory that runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("lowbit._native")

from lowbit.compress import quantize_checkpoint
from lowbit.interop.export import export
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.loader import load_model

from ..model import tiny_models

# What a file can hold of each: scores scaled by head_dim, experts in every layer.
SETTINGS = {
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {"query_pre_attn_scalar": 32},
    "phi3": {},
    "phi3-longrope": {},
    "olmo2": {},
    "gpt2": {},
    "neox": {},
    "mixtral": {"sliding_window": None},
    "qwen3-moe": {"norm_topk_prob": True},
    "olmoe": {},
    "gpt-oss": {},
}
IDS = tiny_models.token_ids(24)


def logits(model, ids):
    return model.decoder.logits(np.array(ids, np.int32), [model.cache(len(ids))], [len(ids)], all=True)


def rounded(config):
    """Without what GGUF does not say or says in float32."""
    rope = replace(config.rope, attention_factor=None, factors=(), long_factors=())
    return replace(
        config, ignored=(), bos_ids=(), eos_ids=(), norm_eps=np.float32(config.norm_eps), rope=rope
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_to_gguf_and_into_a_quantized_directory(name, tmp_path):
    model = tiny_models.build(tiny_models.CASES[name], **SETTINGS[name])
    folder = tiny_models.save(model, tmp_path / "model")
    file = tmp_path / "model.gguf"
    export(folder, "gguf", file)
    with open_checkpoint(folder) as before, open_checkpoint(file) as after:
        assert rounded(before.config) == rounded(after.config)
        assert set(after.names()) == set(before.names()) - (
            {"lm_head.weight"} if before.config.tied else set()
        )
        for tensor in after.names():
            one, other = before.read(tensor), after.read(tensor)
            offset = after.config.norm_offset if "norm" in tensor else 0
            np.testing.assert_array_equal(other + np.float32(offset), one + np.float32(offset))
    wanted = tiny_models.logits(model, IDS)
    given = logits(load_model(file, activations="int16"), IDS)
    np.testing.assert_allclose(given, wanted, atol=5e-3 * np.abs(wanted).max(), rtol=0)

    quantize_checkpoint(file, "int8-g32", tmp_path / "out")
    loaded = load_model(tmp_path / "out", activations="int16", kv_bits=16)
    assert rounded(loaded.config) == rounded(after.config)
    given = logits(loaded, IDS)
    assert np.abs(given - wanted).mean() < 0.03 * np.abs(wanted).max()
    best = np.mean(given.argmax(-1) == wanted.argmax(-1))
    assert best > 0.7
