"""The small random model of tests/tiny_checkpoint.py."""

import importlib.util
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location(
    "tiny_checkpoint", Path(__file__).resolve().parents[1] / "tiny_checkpoint.py"
)
tiny_checkpoint = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_checkpoint)
tiny_model = tiny_checkpoint.tiny_model
