"""The public names at work, as the README shows them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import lowbit

_SPEC = importlib.util.spec_from_file_location(
    "tiny_checkpoint", Path(__file__).parent / "tiny_checkpoint.py"
)
_tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_tiny)
tiny_model = _tiny.tiny_model


@pytest.mark.parametrize(
    "fmt",
    ["int4-g64", "nf4", "ternary-g64", lowbit.Format.codebook([-3.0, -1.0, 0.5, 4.0], group_size=64), "fp16"],
)
def test_quantize_an_array_and_multiply(rng, fmt):
    weight = rng.standard_normal((48, 128)).astype(np.float32)
    m = lowbit.quantize(weight, fmt)
    assert isinstance(m, lowbit.PackedMatrix) and m.shape == (48, 128)
    x = rng.standard_normal((3, 128)).astype(np.float32)
    exact = x.astype(np.float64) @ m.dequantize().astype(np.float64).T
    # int16 activations carry 15 bits of the largest value of a group, so the error is at most
    # half a step of it times the sum of the magnitudes of a row.
    bound = np.abs(x).max() * 2.0**-15 * np.abs(m.dequantize()).sum(1).max() + 1e-4
    y = lowbit.matmul(x, m, activations="int16")
    assert y.dtype == np.float32 and y.shape == (3, 48)
    assert np.abs(y - exact).max() <= bound
    y8 = lowbit.matmul(x, m)
    assert np.abs(y8 - exact).max() <= bound * 2.0**8
    assert np.abs(y8).max() > 1  # not all zero
    assert lowbit.matmul(x[:0], m).shape == (0, 48)


def test_matmul_refuses(rng):
    m = lowbit.quantize(np.ones((4, 64), np.float32), "int8-g64")
    x = np.ones((2, 64), np.float32)
    for bad, words in [
        (x[:, :32], r"\[2, 32\].*\[batch, 64\]"),
        (x[0], "batch, 64"),
        (x * np.nan, r"x\[0, 0\] is nan"),
        (x.astype(complex), "complex"),
    ]:
        with pytest.raises(lowbit.FormatError, match=words):
            lowbit.matmul(bad, m)
    with pytest.raises(lowbit.UnsupportedError, match="int4"):
        lowbit.matmul(x, m, activations="int4")
    with pytest.raises(lowbit.FormatError, match="PackedMatrix"):
        lowbit.matmul(x, x)


def test_quantize_refuses():
    with pytest.raises(lowbit.FormatError, match="44"):
        lowbit.quantize(np.ones((4, 64), np.float32), "int44")
    with pytest.raises(lowbit.RequestError, match="output"):
        lowbit.quantize(np.ones((4, 64), np.float32), "int4", output="somewhere")
    with pytest.raises(lowbit.RequestError, match="name the directory"):
        lowbit.quantize("model", "int4")
    with pytest.raises(AttributeError, match="frobnicate"):
        _ = lowbit.frobnicate


def test_a_checkpoint_there_and_back(tiny_model, tmp_path):
    report = lowbit.quantize(
        tiny_model, "int8-g32", tmp_path / "small", layers={"*.o_proj.weight": "int4-g32"}
    )
    assert report["bits_per_weight"] > 8
    small, original = lowbit.load(tmp_path / "small"), lowbit.load(tiny_model)
    assert small.bits_per_weight < original.bits_per_weight
    assert small.generate("hello", max_tokens=4).generated_tokens <= 4
    assert small.model.weights["model.layers.0.self_attn.o_proj.weight"].format_name == "int4-g32"


def test_emulate():
    assert lowbit.emulate(np.array([0.3, 1.3], np.float32), "e3m2").tolist() == [0.3125, 1.25]
