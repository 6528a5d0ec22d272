"""lowbit inside transformers: models load, quantize on load, generate and save, on the kernels of lowbit.

    import lowbit
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("smol-int4")      # a directory of `lowbit quantize`
    model = AutoModelForCausalLM.from_pretrained("SmolLM2-135M",   # or floats, which are quantized here
                                                 quantization_config=lowbit.Scheme("int4-g64"))
    model.generate(**tokenizer("The capital of France is", return_tensors="pt"))
    model.save_pretrained("smol-int4")                             # for lowbit and for transformers

`import lowbit` is all that it takes: import_hook.py enters the classes here into transformers' tables when
transformers loads them. What is exact and what is not: docs/interop.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.interop.transformers.config import LowbitConfig
    from lowbit.interop.transformers.convert import dequantize_model, quantize_model
    from lowbit.interop.transformers.modules import PackedEmbedding, PackedLinear
    from lowbit.interop.transformers.quantizer import LowbitQuantizer

_HOME = {
    "LowbitConfig": "config",
    "LowbitQuantizer": "quantizer",
    "PackedEmbedding": "modules",
    "PackedLinear": "modules",
    "dequantize_model": "convert",
    "quantize_model": "convert",
}

__all__ = [
    "LowbitConfig",
    "LowbitQuantizer",
    "PackedEmbedding",
    "PackedLinear",
    "dequantize_model",
    "quantize_model",
    "register",
]


def register() -> None:
    """Enter LowbitConfig and LowbitQuantizer into transformers' tables; `import lowbit` sees to it."""
    from transformers.quantizers import auto

    from lowbit.interop.transformers.config import LowbitConfig
    from lowbit.interop.transformers.quantizer import LowbitQuantizer

    if "lowbit" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config("lowbit")(LowbitConfig)
    if "lowbit" not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer("lowbit")(LowbitQuantizer)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit.interop.transformers' has no attribute {name!r}")
    value = getattr(import_module(f"lowbit.interop.transformers.{_HOME[name]}"), name)
    globals()[name] = value
    return value
