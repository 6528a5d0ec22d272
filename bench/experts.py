"""Decode and prefill of random mixtures of experts against what their bytes allow.

    python bench/experts.py            # Mixtral-like, 1.1B weights of 4 bits; then many small experts
    python bench/experts.py --threads 1

A step of few tokens must read the chosen experts' weights and nothing of the others: the bound is those
bytes, attention, router and head over the bandwidth measured just before.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import _native
from lowbit.formats import Format, parse_format
from lowbit.model.config import ModelConfig, from_transformers
from lowbit.model.loader import LoadedModel, load_model
from lowbit.model.tensors import expected_tensors
from lowbit.packed import PackedMatrix
from lowbit.quantize.round_to_nearest import round_to_nearest

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
SHAPES = {
    "mixtral-like": {
        "model_type": "mixtral",
        "num_hidden_layers": 12,
        "intermediate_size": 3584,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "many-small": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 8,
        "intermediate_size": 3072,
        "moe_intermediate_size": 384,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "head_dim": 64,
    },
}


class Random:
    """A checkpoint of one description: each shape is rounded once, and every matrix has memory of its own."""

    kind, path = "random", Path("random")

    def __init__(self, config: ModelConfig, format: Format):
        self.config, self._format = config, format
        self._shapes = {tensor.name: tensor.shape for tensor in expected_tensors(config)}
        self._made: dict[tuple[int, ...], PackedMatrix] = {}
        self._rng = np.random.default_rng(0)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        return np.ones(self._shapes[name], np.float32)

    def matrix(self, name: str) -> PackedMatrix:
        shape = self._shapes[name]
        if name.endswith("router.weight"):  # of its own for every layer, so that layers choose apart
            values = self._rng.standard_normal(shape, np.float32) / shape[1] ** 0.5
            return round_to_nearest(values, parse_format("fp16"))
        if shape not in self._made:
            values = self._rng.standard_normal(shape, np.float32) / shape[1] ** 0.5
            self._made[shape] = round_to_nearest(values, self._format)
        meta, arrays = self._made[shape].state()
        return PackedMatrix.from_state(meta, {key: array.copy() for key, array in arrays.items()})

    def tokenizer(self) -> None:
        return None


def step_bytes(model: LoadedModel, experts: float) -> float:
    """Weights read by a step whose sparse layers read `experts` experts each."""
    total = 0.0
    for name, matrix in model.weights.items():
        if name == "model.embed_tokens.weight" and not model.config.tied:
            continue  # one row of it
        share = experts / model.config.n_experts if ".experts." in name else 1.0
        total += matrix.nbytes * share
    return total


def seconds_of(model: LoadedModel, batch: int, tokens: int, rounds: int) -> float:
    """The fastest step of `batch` sequences with `tokens` new ones each, after 64 positions."""
    rng = np.random.default_rng(1)
    vocab = model.config.vocab_size
    caches = [model.cache(64 + (rounds + 2) * tokens) for _ in range(batch)]
    for cache in caches:
        model.decoder.logits(rng.integers(0, vocab, 64).astype(np.int32), [cache], [64])
    times = []
    for _ in range(rounds + 2):
        ids = rng.integers(0, vocab, batch * tokens).astype(np.int32)
        started = time.perf_counter()
        model.decoder.logits(ids, caches, [tokens] * batch)
        times.append(time.perf_counter() - started)
    return float(np.min(times[2:]))


def expected_experts(config: ModelConfig, tokens: int) -> float:
    """How many experts of a layer some of `tokens` tokens choose, if all choices are alike."""
    return config.n_experts * (1 - (1 - config.experts_per_token / config.n_experts) ** tokens)


def measure(name: str, threads: int | None, bits: str) -> None:
    config = from_transformers({**SIZES, **SHAPES[name]})
    started = time.perf_counter()
    checkpoint: Any = Random(replace(config, tied=False), parse_format(bits))
    model = load_model(checkpoint, threads=threads)
    weights = sum(m.out_features * m.in_features for m in model.weights.values())
    print(
        f"{name}: {weights / 1e9:.2f}B weights, {model.nbytes / 1e6:.0f} MB of {bits}, "
        f"{_native.threads()} threads, {_native.isa()}, built in {time.perf_counter() - started:.1f} s"
    )
    bandwidth = max(_native.measure_bandwidth(256 << 20, 0.3) for _ in range(3))
    print(f"  bandwidth {bandwidth / 1e9:.1f} GB/s")
    for batch in (1, 2, 4, 8, 32):
        seconds = seconds_of(model, batch, 1, 12)
        read = step_bytes(model, expected_experts(config, batch))
        print(
            f"  decode of {batch:2}: {seconds * 1e3:7.2f} ms, {batch / seconds:7.1f} tokens/s, "
            f"{read / 1e6:6.0f} MB, {read / seconds / bandwidth:.0%} of the bandwidth"
        )
    seconds = seconds_of(model, 1, 480, 2)
    per_token = step_bytes(model, config.experts_per_token) / 4.5 * 8 * 2
    print(f"  prefill of 480: {480 / seconds:.0f} tokens/s, {480 * per_token / seconds / 1e9:.0f} Gop/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--format", default="int4-g64")
    parser.add_argument("--shape", choices=SHAPES)
    args = parser.parse_args()
    for shape in [args.shape] if args.shape else SHAPES:
        measure(shape, args.threads, args.format)
