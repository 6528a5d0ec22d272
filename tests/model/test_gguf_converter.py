"""What llama.cpp's own converter makes of a small model of every family is read as the model that it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.gguf_file import GGUFFile
from lowbit.model.gguf_names import (
    ARCHITECTURE_OF,
    ARCHITECTURES,
    LONG_FACTORS,
    SHORT_FACTORS,
    is_shifted_norm,
)
from lowbit.model.reference import reference_logits
from lowbit.model.sources import stored_tensors

from . import tiny_models

# Cases whose every setting a GGUF file can hold: scores scaled by head_dim, windows in the usual layers.
SETTINGS = {
    "llama": {},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 1, 1]},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention"] * 3},
    "phi3": {},
    "phi3-longrope": {},
    "olmo2": {},
    "gpt2": {"n_inner": None},
    "neox": {},
    "neox-sequential": {"tie_word_embeddings": False, "attention_bias": True, "rope_parameters": {
        "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "rope_type": "default"
    }},
    "mixtral": {"sliding_window": None},
    "qwen3-moe": {"norm_topk_prob": True},
    "olmoe": {},
    "gpt-oss": {},
}  # fmt: skip


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The folder of llama.cpp's sources, which `make bench` fetches."""
    root = Path(os.environ.get("LOWBIT_PEERS", Path(__file__).parents[2] / ".cache" / "peers"))
    found = sorted(root.glob("llama.cpp-*/source/*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    if not found:
        pytest.skip(f"llama.cpp's converter is not in {root}: `make bench` fetches it, or set LOWBIT_PEERS")
    pytest.importorskip("gguf", reason="the converter needs the gguf package: pip install gguf")
    return found[-1].parent


@pytest.fixture(scope="session")
def converted_models(llama_cpp, tmp_path_factory):
    """Name -> (model, its directory, the converted file)."""
    models, arguments = {}, []
    for name, settings in SETTINGS.items():
        model = tiny_models.build(tiny_models.CASES[name], **settings)
        folder = tiny_models.save(model, tmp_path_factory.mktemp(name))
        if name == "gemma3":  # its converter counts the tokens, and nothing else of this file is read
            vocabulary = {"vocab": {str(i): i for i in range(tiny_models.SIZES["vocab_size"])}}
            (folder / "tokenizer.json").write_text(json.dumps({"model": vocabulary, "added_tokens": []}))
        models[name] = model, folder, folder / "model.gguf"
        arguments += [folder, folder / "model.gguf"]
    command = [sys.executable, Path(__file__).with_name("convert_without_tokenizer.py"), llama_cpp]
    done = subprocess.run(list(map(str, command + arguments)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return models


@pytest.mark.interop(type="tensor names", direction="read", against="llama.cpp's converter")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_converted_model_is_the_model(name, converted_models):
    model, folder, output = converted_models[name]
    with open_checkpoint(output) as converted, open_checkpoint(folder) as source:
        ours, theirs = asdict(converted.config), asdict(source.config)
        for fields in (ours, theirs):  # GGUF holds float32, and ends of text with the tokenizer
            for key in ("bos_ids", "eos_ids", "ignored"):
                del fields[key]
            fields["norm_eps"] = np.float32(fields["norm_eps"])
            fields["rope"]["factors"] = np.float32(fields["rope"]["factors"]).tolist()
        if ours["rope"]["attention_factor"] is not None:  # longrope: what our description derives
            theirs["rope"]["attention_factor"] = ours["rope"]["attention_factor"]
        assert ours == theirs
        names = set(source.names()) - ({"lm_head.weight"} if source.config.tied else set())
        assert set(converted.names()) == names
        weights = {}
        for tensor in names:
            weights[tensor] = converted.read(tensor)
            np.testing.assert_allclose(weights[tensor], source.read(tensor), atol=1e-7, err_msg=tensor)
            if weights[tensor].ndim == 2:
                np.testing.assert_array_equal(converted.matrix(tensor).dequantize(), weights[tensor])
        ids = tiny_models.token_ids(24)
        wanted = tiny_models.logits(model, ids)
        logits = reference_logits(converted.config, weights, ids)
    np.testing.assert_allclose(logits, wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.interop(type="tensor names", direction="write", against="llama.cpp's converter")
@pytest.mark.parametrize("name", SETTINGS)
def test_what_we_would_write_is_what_the_converter_wrote(name, converted_models):
    _, folder, output = converted_models[name]
    file = GGUFFile(output)
    with open_checkpoint(folder) as source:
        row = ARCHITECTURES[ARCHITECTURE_OF[source.config.family]]
        names = [t for t in source.names() if t != "lm_head.weight" or not source.config.tied]

        def stored(tensor):
            values = source.read(tensor)
            return values + np.float32(row.norm_shift) if is_shifted_norm(tensor) else values

        planned = stored_tensors(source.config, {t: source.shape(t) for t in names}, row.names)
        assert planned.keys() == file.tensors.keys() - {SHORT_FACTORS, LONG_FACTORS}
        for tensor, plan in planned.items():
            written = file.data(tensor).view(np.float32).reshape(file.tensors[tensor].shape)
            assert plan.shape == written.shape
            np.testing.assert_array_equal(plan.assemble(stored), written, err_msg=tensor)
    file.close()
