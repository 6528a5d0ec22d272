"""What we export is what vLLM holds after its own code has loaded it, by bench/peers/vllm_loading.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lowbit
from lowbit.interop.export import export
from lowbit.model.checkpoint import open_checkpoint

from ..model import tiny_models

ROOT = Path(__file__).resolve().parents[2]
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Target -> the format of ours that it holds exactly. GPTQ of 8 bits asks for a GPU before it loads.
CASES = {
    "compressed-tensors:int4-g64": "int4-g64",
    "compressed-tensors:int4a-g64": "int4a-g64",
    "compressed-tensors:int8-g64": "int8-g64",
    "compressed-tensors:w8a8": "int8-row",
    "compressed-tensors:fp8": "e4m3fn-row",
    "gptq": "int4-g64",
    "awq": "int4a-g64",
}


@pytest.fixture(scope="module")
def python():
    """The interpreter of a vLLM: this one's, or LOWBIT_VLLM_PYTHON."""
    if path := os.environ.get("LOWBIT_VLLM_PYTHON"):
        return path
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("pip install vllm into an environment and name its python in LOWBIT_VLLM_PYTHON")
    return sys.executable


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama whose rows and inputs are multiples of what vLLM's packings ask for."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_hidden_layers": 2}
    model = tiny_models.build(tiny_models.CASES["llama"], **sizes)
    return tiny_models.save(model, tmp_path_factory.mktemp("vllm") / "floats")


@pytest.mark.parametrize(
    ("target", "format"),
    [
        pytest.param(
            target,
            format,
            marks=pytest.mark.interop(type=target, direction="write", against="vLLM's loading code"),
        )
        for target, format in CASES.items()
    ],
)
def test_vllm_holds_our_weights(python, source, tmp_path, target, format):
    lowbit.quantize(source, format, tmp_path / "ours", verify=False)
    export(tmp_path / "ours", target, tmp_path / "theirs")
    script = ROOT / "bench" / "peers" / "vllm_loading.py"
    command = [python, str(script), str(tmp_path / "theirs"), str(tmp_path / "found.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")
    ours = open_checkpoint(tmp_path / "ours")
    assert len(found.files) == 2 * 4  # of each layer: qkv, o, gate and up, down
    for name in found.files:
        stem, _, last = name.rpartition(".")
        parts = [ours.read(f"{stem}.{part}.weight") for part in FUSED.get(last, (last,))]
        np.testing.assert_array_equal(found[name], np.concatenate(parts), err_msg=name)
