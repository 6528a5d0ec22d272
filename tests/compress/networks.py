"""Small networks of every family as (config, weights), and statistics of inputs with loud channels."""

from functools import cache
from pathlib import Path

import numpy as np

from lowbit.model.config import from_transformers
from lowbit.model.tensors import expected_tensors
from lowbit.quantize.statistics import Statistics

from ..model import tiny_models

CASES = list(tiny_models.CASES)


@cache
def _built(case):
    model = tiny_models.build(tiny_models.CASES[case])
    return from_transformers(tiny_models.config_dict(model)), tiny_models.weights(model)


def network(case):
    """(config, weights by canonical name), fresh arrays; every norm gain and bias is random."""
    config, weights = _built(case)
    return config, {t.name: weights[t.name].copy() for t in expected_tensors(config)}


def inputs(width, tokens=128, seed=0):
    """float32 [tokens, width]: noise whose channels differ, a few by far."""
    rng = np.random.default_rng(seed)
    loudness = np.exp(rng.standard_normal(width) / 2)
    loudness[rng.choice(width, max(2, width // 32), replace=False)] *= 20
    return (rng.standard_normal((tokens, width)) * loudness).astype(np.float32)


def statistics(x):
    return Statistics(x.T @ x / np.float32(len(x)), np.abs(x).max(0), len(x))


class Memory:
    """A checkpoint that is held in memory."""

    path, kind = Path("memory"), "transformers"

    def __init__(self, case):
        self.config, self.weights = network(case)

    def names(self):
        return list(self.weights)

    def shape(self, name):
        return self.weights[name].shape

    def dtype(self, name):
        return "F32"

    def read(self, name):
        return self.weights[name].copy()

    def tokenizer(self):
        return None

    def close(self):
        self.weights = {}
