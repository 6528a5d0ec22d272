"""The small random model of tests/tiny_checkpoint.py, and the same without tokenizer."""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "tiny_checkpoint", Path(__file__).resolve().parents[1] / "tiny_checkpoint.py"
)
tiny_checkpoint = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_checkpoint)
tiny_model, base_model = tiny_checkpoint.tiny_model, tiny_checkpoint.base_model


@pytest.fixture
def silent_model(tmp_path):
    return tiny_checkpoint.write_tiny_llama(tmp_path / "silent", tokenizer=False)
