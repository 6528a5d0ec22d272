"""Damaged files whose tensors are parts of stored ones: fused, transposed, stacked, ordered by pairs."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from lowbit.model.checkpoint import open_checkpoint

from . import fuzz_seeds
from .fuzz_seeds import mutate_bytes, safetensors_bytes
from .gguf_bytes import model_bytes, pair
from .test_fuzz_readers import CASES, exercise, mutated_directory

RNG = np.random.default_rng(6)
SIZES = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64}
SIZES |= {"attention.head_count": 2, "attention.head_count_kv": 1}


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def floats(*shape):
    return 0, RNG.normal(size=shape).astype(np.float32)


def q8_0(*shape):
    return 8, RNG.integers(0, 64, (*shape[:-1], shape[-1] // 32 * 34), dtype=np.uint8)


def whole(path):
    """How many tensors of layers can be read before anything is damaged."""
    with open_checkpoint(path) as checkpoint:
        layers = [name for name in checkpoint.names() if name.startswith("model.layers.0.")]
        return sum(checkpoint.read(name).shape == checkpoint.shape(name) for name in layers)


GGUF = {
    "phi3": (
        {"rope.dimension_count": 16, "rope.scaling.original_context_length": 16},
        {
            "blk.0.attn_qkv.weight": q8_0(64, 32),
            "blk.0.ffn_up.weight": floats(128, 32),
            "rope_factors_short.weight": (0, np.ones(8, np.float32)),
            "rope_factors_long.weight": (0, np.full(8, 2, np.float32)),
        },
    ),
    "llama": (
        {"expert_count": 3, "expert_used_count": 2},
        {
            "blk.0.attn_q.weight": q8_0(32, 32),
            "blk.0.ffn_gate_inp.weight": floats(3, 32),
            "blk.0.ffn_gate_exps.weight": q8_0(3, 64, 32),
            "blk.0.ffn_down_exps.weight": floats(3, 32, 64),
        },
    ),
    "gemma2": (
        {"attention.sliding_window": 8, "attention.key_length": 16, "attention.value_length": 16},
        {
            "blk.0.attn_norm.weight": floats(32),
            "blk.0.post_ffw_norm.weight": floats(32),
            "blk.0.attn_v.weight": q8_0(16, 32),
        },
    ),
}


@pytest.mark.parametrize("architecture", GGUF)
def test_mutated_gguf(tmp_path, architecture):
    numbers, tensors = GGUF[architecture]
    pairs = [pair("general.architecture", "str", architecture)]
    pairs += [pair(f"{architecture}.{key}", "u32", value) for key, value in (SIZES | numbers).items()]
    pairs += [pair(f"{architecture}.attention.layer_norm_rms_epsilon", "f32", 1e-5)]
    around = {"token_embd.weight": q8_0(40, 32), "output_norm.weight": floats(32)}
    seed = model_bytes(pairs, around | tensors)
    path = tmp_path / "model.gguf"
    path.write_bytes(seed)
    assert exercise(path) and whole(path) > 2
    opened = 0
    for case in range(CASES):
        path = tmp_path / f"{case % 2}.gguf"
        path.write_bytes(mutate_bytes(seed, random.Random(case)))
        opened += exercise(path)
    assert 0 < opened < CASES


LLAMA = {
    key: value for key, value in fuzz_seeds.CONFIG.items() if key not in ("rope_scaling", "architectures")
}
DIRECTORIES = {
    "gpt2": (
        {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 64},
        {
            "transformer.wte.weight": (40, 32),
            "transformer.wpe.weight": (64, 32),
            "transformer.h.0.attn.c_attn.weight": (32, 96),
            "transformer.h.0.attn.c_attn.bias": (96,),
            "transformer.h.0.mlp.c_fc.weight": (32, 128),
        },
    ),
    "gpt_neox": (
        {
            **{key: value for key, value in LLAMA.items() if key != "rms_norm_eps"},
            "num_key_value_heads": 2,
            "hidden_act": "gelu",
        },
        {
            "gpt_neox.embed_in.weight": (40, 32),
            "gpt_neox.layers.0.attention.query_key_value.weight": (96, 32),
            "gpt_neox.layers.0.attention.query_key_value.bias": (96,),
            "embed_out.weight": (40, 32),
        },
    ),
    "gpt_oss": (
        {**LLAMA, "head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8},
        {
            "model.embed_tokens.weight": (40, 32),
            "model.layers.0.self_attn.sinks": (2,),
            "model.layers.0.mlp.experts.gate_up_proj": (3, 32, 128),
            "model.layers.0.mlp.experts.gate_up_proj_bias": (3, 128),
            "model.layers.0.mlp.experts.down_proj": (3, 64, 32),
        },
    ),
}


@pytest.mark.parametrize("family", DIRECTORIES)
def test_mutated_directories(tmp_path, family):
    config, shapes = DIRECTORIES[family]
    entries, data = {}, b""
    for name, shape in shapes.items():
        raw = RNG.normal(size=shape).astype("<f4").tobytes()
        places = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": places}
        data += raw
    files = {
        "model.safetensors": safetensors_bytes(entries, data),
        "config.json": json.dumps({**config, "model_type": family}).encode(),
    }
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert exercise(folder) and whole(folder) > 2
    opened = 0
    for case in range(CASES):
        mutated_directory(folder, files, case)
        opened += exercise(folder)
    assert 0 < opened < CASES
