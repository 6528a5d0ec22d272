"""Run llama.cpp's converter on models without a tokenizer: python THIS LLAMA_CPP_FOLDER MODEL FILE MODEL ..

A helper of test_gguf_converter.py, in a process of its own because the converter brings its own gguf package.
"""

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

folder, *pairs = sys.argv[1:]
sys.path[:0] = [folder, str(Path(folder) / "gguf-py")]


def no_vocabulary(self: Any) -> None:
    return None


base = importlib.import_module("conversion.base")
base.TextModel.set_vocab = no_vocabulary
for name in ("gemma", "phi", "gpt2", "gptneox", "olmo", "gpt_oss", "qwen", "llama"):
    for value in vars(importlib.import_module(f"conversion.{name}")).values():
        if isinstance(value, type) and "set_vocab" in vars(value):
            value.set_vocab = no_vocabulary

load_hparams = base.ModelBase.load_hparams


def with_old_keys(*arguments: Any, **options: Any) -> dict[str, Any]:
    """Keys that published config.json files have and transformers 5 no longer writes."""
    fields = load_hparams(*arguments, **options)
    share = fields.get("rope_parameters", {}).get("partial_rotary_factor", 1.0)
    return {"n_ctx": fields.get("n_positions"), "rotary_pct": share, **fields}


base.ModelBase.load_hparams = staticmethod(with_old_keys)
script = str(Path(folder) / "convert_hf_to_gguf.py")
for model, file in zip(pairs[::2], pairs[1::2]):
    sys.argv = [script, model, "--outfile", file, "--outtype", "f32"]
    runpy.run_path(script, run_name="__main__")
