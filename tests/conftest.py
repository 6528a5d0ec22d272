"""Shared fixtures: where optional data lies, and a fixed seed."""

import os
from pathlib import Path

import numpy as np
import pytest

# No test measures this machine or writes to the user's cache folder unless it says so.
os.environ.setdefault("LOWBIT_TUNING", "off")
# GPU kernels run under Triton's interpreter, which has to be chosen before anything imports Triton;
# TRITON_INTERPRET=0 tests them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def shared_data():
    """Return a function that gives the path of a file under the optional data folder, or skips."""

    def locate(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"optional test data {name} is not on this machine")
        return path

    return locate


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)
