"""Floats rounded to GGUF types: at least as near as the gguf package's and simple rules, alike everywhere."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from lowbit.errors import FormatError, UnsupportedError
from lowbit.interop.gguf_fit import FITTED, ROUNDED, fitted

from .matrices import weights

# Relative squared error on normal weights, which the type cannot go much below, and a margin above it.
LIMITS = {"Q4_1": 0.0066, "Q4_K": 0.0066, "Q6_K": 0.00042}


def decoded(raw: np.ndarray, kind: str) -> np.ndarray:
    return dequantize(raw, gguf.GGMLQuantizationType[kind])


def error(weight: np.ndarray, found: np.ndarray) -> float:
    return float(np.square(found - weight).sum() / np.square(weight).sum())


@pytest.mark.parametrize("kind", FITTED)
def test_normal_weights(kind):
    weight = np.random.default_rng(0).normal(0, 0.03, (64, 1024)).astype(np.float32)
    assert 0 < error(weight, decoded(fitted(weight, kind, "x"), kind)) < LIMITS[kind]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_no_worse_than_the_package(kind):
    weight = np.random.default_rng(1).normal(0, 0.03, (64, 1024)).astype(np.float32)
    theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    ours = fitted(weight, kind, "x")
    assert ours.shape == theirs.shape
    assert error(weight, decoded(ours, kind)) <= 1.001 * error(weight, decoded(theirs, kind))


@pytest.mark.parametrize("kind", [*ROUNDED, *FITTED])
def test_hard_blocks(kind):
    """Zeros, equal numbers, an outlier, one sign, tiny scales: nothing is far off, zero stays zero."""
    weight = weights()
    found = decoded(fitted(weight, kind, "x"), kind)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[1], 0)
    if kind not in ("TQ1_0", "TQ2_0"):
        np.testing.assert_allclose(found[2], 0.25, rtol=0.02 if kind != "MXFP4" else 0.01)
        assert abs(found[3, 7] - 30.0) < (3.5 if kind == "MXFP4" else 2.5)
        assert error(weight[5], found[5]) < (0.03 if kind == "MXFP4" else 0.02)


@pytest.mark.parametrize("kind", FITTED)
def test_tiny_weights_keep_their_shape(kind):
    """Scales among the subnormal numbers of fp16, where d itself is coarse."""
    weight = np.random.default_rng(3).normal(0, 2e-5, (8, 256)).astype(np.float32)
    assert error(weight, decoded(fitted(weight, kind, "x"), kind)) < 0.1


def test_every_instruction_set_gives_the_same_bytes(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from lowbit.interop.gguf_fit import fitted, FITTED\n"
        "w = np.random.default_rng(0).normal(0, 0.03, (19, 512)).astype(np.float32)\n"
        "np.save(sys.argv[1], np.concatenate([fitted(w, k, 'x').reshape(-1) for k in FITTED]))\n"
    )
    from lowbit import _native

    found = []
    for isa in _native.supported_isas():
        path = tmp_path / f"{isa}.npy"
        environment = {**os.environ, "LOWBIT_ISA": isa}
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2] / "src")
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment)
        found.append(np.load(path))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_bad_weights_are_refused():
    weight = weights()
    weight[7, 9] = np.nan
    with pytest.raises(FormatError, match=r"weight\[7, 9\]"):
        fitted(weight, "Q4_0", "export x")
    with pytest.raises(FormatError, match=r"weight\[7, 9\]"):
        fitted(weight, "Q4_K", "export x")
    with pytest.raises(UnsupportedError, match="65504; take bf16"):
        fitted(np.full((1, 32), 1e5, np.float32), "F16", "export x")
