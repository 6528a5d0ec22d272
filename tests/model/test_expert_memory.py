"""Experts stay in the mapped file: a token touches those that it takes, and no others."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("lowbit._native")

import lowbit
from lowbit.model.loader import load_model

from . import tiny_models

SMAPS = Path("/proc/self/smaps")


def resident_bytes(file: Path) -> int:
    """Of a mapped file, what this process has touched."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not SMAPS.is_file(), reason="needs /proc/self/smaps")
def test_a_token_touches_the_experts_it_takes(tmp_path):
    settings = {"num_experts": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "head_dim": 64}
    settings |= {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    network = tiny_models.build(tiny_models.CASES["qwen3-moe"], **settings)
    tiny_models.save(network, tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "int4-g32", tmp_path / "int4", verify=False)
    file = tmp_path / "int4" / "model.safetensors"
    model = load_model(tmp_path / "int4")
    loaded = resident_bytes(file)  # scales, which are checked
    assert 0 < loaded < 0.25 * file.stat().st_size
    cache = model.cache()
    experts = [matrix.nbytes for name, matrix in model.weights.items() if ".experts." in name]
    of_a_token = sum(experts) / 64 * 2
    model.decoder.logits(np.array([5], np.int32), [cache], [1])
    first = resident_bytes(file) - loaded
    # Beside them attention, router, norms and head; the system maps a few pages around each that is read.
    assert 0.5 * of_a_token < first < 4 * of_a_token
