"""Shared fixtures: where optional data lies, and a fixed seed."""

from pathlib import Path

import numpy as np
import pytest

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
