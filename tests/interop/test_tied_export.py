"""A head that is the embedding is no quantized layer: transformers would look for its codes."""

import json

import numpy as np
import pytest

pytest.importorskip("compressed_tensors", reason="pip install --no-deps compressed-tensors loguru")

import transformers

import lowbit
from lowbit.interop.export import export

from ..model import tiny_models

TOKENS = tiny_models.token_ids(16)


@pytest.mark.interop(type="compressed-tensors int4-g32, tied head", direction="write", against="transformers")
def test_transformers_runs_a_tied_model(tmp_path):
    tiny_models.save(tiny_models.build(tiny_models.CASES["llama-tied"]), tmp_path / "floats")
    lowbit.quantize(tmp_path / "floats", "int4-g32", tmp_path / "int4", verify=False)
    export(tmp_path / "int4", "compressed-tensors", tmp_path / "theirs", embedding="fp32")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    load = transformers.AutoModelForCausalLM.from_pretrained
    found = tiny_models.logits(load(tmp_path / "theirs", dtype="float32"), TOKENS)
    expected = tiny_models.logits(load(tmp_path / "int4", dtype="float32").dequantize(), TOKENS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
