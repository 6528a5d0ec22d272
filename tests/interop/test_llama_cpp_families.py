"""llama.cpp itself runs every family that we write: its perplexity on a text is that of transformers.

The networks are random and sharp, so that a forgotten norm, cap, bias or rotation moves the perplexity
by far more than the 16-bit keys and values of llama.cpp do (0.2% at most, measured).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from lowbit.interop.export import export

from ..model import tiny_models
from ..tiny_checkpoint import _tokenizer

# What llama.cpp runs of each: no windows in Phi-3, keys of full width in OLMoE, GELU by its tanh formula.
SETTINGS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {"query_pre_attn_scalar": 32},
    "phi3": {},
    "phi3-longrope": {"sliding_window": None},
    "olmo2": {},
    "gpt2": {},
    "neox": {},
    "mixtral": {"sliding_window": None},
    "qwen3-moe": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 6},
    "gpt-oss": {},
}
WINDOW, COUNT = 64, 8
TEXT = "".join(
    f"Line {i}: the {i * 37 % 101} quick foxes jump over {i * i % 89} dogs; so it goes.\n" for i in range(12)
)


@pytest.fixture(scope="module")
def llama_perplexity() -> Path:
    root = Path(os.environ.get("LOWBIT_PEERS", Path(__file__).parents[2] / ".cache" / "peers"))
    found = sorted(root.glob("llama.cpp-*/build-*/bin/llama-perplexity"))
    if not found:
        pytest.skip(f"llama.cpp is not built in {root}: `make bench` builds it, or set LOWBIT_PEERS")
    return found[-1]


def perplexity(model) -> float:
    """As llama-perplexity has it: of the second half of each window."""
    ids = list(TEXT.encode())
    losses = []
    for start in range(0, COUNT * WINDOW, WINDOW):
        window = ids[start : start + WINDOW]
        logits = tiny_models.logits(model, window).astype(np.float64)
        logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        losses += [-logits[at, window[at + 1]] for at in range(WINDOW // 2, WINDOW - 1)]
    return float(np.exp(np.mean(losses)))


@pytest.mark.interop(type="F32", direction="write", against="llama.cpp")
@pytest.mark.parametrize("name", SETTINGS)
def test_llama_cpp_computes_the_same(name, tmp_path, llama_perplexity):
    assert len(TEXT) > COUNT * WINDOW
    model = tiny_models.build(tiny_models.CASES[name], **SETTINGS[name])
    folder = tiny_models.save(model, tmp_path / "model")
    _tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    export(folder, "gguf", tmp_path / "model.gguf")
    if name == "gpt-oss":  # llama.cpp rounds the ends of yarn's ramp, which the model was not trained with
        rounded = {**model.config.rope_parameters, "truncate": True}
        model = tiny_models.build(tiny_models.CASES[name], rope_parameters=rounded)
    (tmp_path / "text").write_text(TEXT)
    command = [llama_perplexity, "-m", tmp_path / "model.gguf", "-f", tmp_path / "text", "-t", 1]
    command += ["-c", WINDOW, "-b", WINDOW, "--chunks", COUNT]
    assert printed(command) == pytest.approx(perplexity(model), rel=5e-3)


def printed(command) -> float:
    """What the program says; the end of its output is at times lost when it ends, so it is asked again."""
    output = ""
    for _ in range(4):
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=120, check=False
        )
        output = done.stdout + done.stderr
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", output)
        if found:
            return float(found[1])
    raise AssertionError(output[-1500:])
