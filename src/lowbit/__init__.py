"""Run language models in the fewest bits, seconds and joules their accuracy allows.

    import lowbit
    model = lowbit.load("smollm2-135m")
    print(model.generate("The capital of France is").text)

Every public name is resolved on first use, so that `import lowbit` costs a millisecond and
`lowbit run` never pays for what it does not touch.
"""

from __future__ import annotations

import sys
import types
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowbit import import_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    import numpy as np

    from lowbit.engine import Generation, LanguageModel, SamplingParameters, load
    from lowbit.engine.config import EngineConfig
    from lowbit.engine.constraint import Grammar
    from lowbit.engine.engine import Engine
    from lowbit.errors import CheckpointError, FormatError, LowbitError, RequestError, UnsupportedError
    from lowbit.formats import FORMATS, Format, Scheme, emulate, parse_format
    from lowbit.formats.auto import Auto
    from lowbit.kernels import matmul
    from lowbit.packed import PackedMatrix

__version__ = "0.1.0"

_HOME = {
    "Auto": "lowbit.formats.auto",
    "FORMATS": "lowbit.formats",
    "Format": "lowbit.formats",
    "Scheme": "lowbit.formats",
    "emulate": "lowbit.formats",
    "parse_format": "lowbit.formats",
    "PackedMatrix": "lowbit.packed",
    "matmul": "lowbit.kernels",
    "Engine": "lowbit.engine.engine",
    "EngineConfig": "lowbit.engine.config",
    "Generation": "lowbit.engine",
    "Grammar": "lowbit.engine.constraint",
    "LanguageModel": "lowbit.engine",
    "SamplingParameters": "lowbit.engine",
    "load": "lowbit.engine",
    "CheckpointError": "lowbit.errors",
    "FormatError": "lowbit.errors",
    "LowbitError": "lowbit.errors",
    "RequestError": "lowbit.errors",
    "UnsupportedError": "lowbit.errors",
}

__all__ = [
    "FORMATS",
    "Auto",
    "CheckpointError",
    "Engine",
    "EngineConfig",
    "Format",
    "FormatError",
    "Generation",
    "Grammar",
    "LanguageModel",
    "LowbitError",
    "PackedMatrix",
    "RequestError",
    "SamplingParameters",
    "Scheme",
    "UnsupportedError",
    "__version__",
    "emulate",
    "load",
    "matmul",
    "parse_format",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))


def quantize(
    source: str | PathLike[str] | np.ndarray,
    format: Any,
    output: str | PathLike[str] | None = None,
    *,
    method: str = "rtn",
    search: str = "mse",
    embedding: Any = None,
    layers: Mapping[str, Any] | None = None,
    calibration: Any = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    restart: bool = False,
    expert_tokens: int | None = None,
    few_tokens: str = "weights",
    verify: bool = True,
    force: bool = False,
    progress: Callable[[float, float, str], None] | None = None,
) -> Any:
    """Quantize an array to a PackedMatrix, or a checkpoint to a directory.

    source: float array [out_features, in_features], or a model: a directory, a .gguf file,
        a hub id or `smollm2-135m`.
    format: a Format or its name (`"int4-g64"`); for a checkpoint also a Scheme or its name,
        or an Auto (`Auto(bits=3.2)`), which chooses a format for each matrix under a budget.
    output: the directory to write; required for a checkpoint, refused for an array.
    method: how to choose the codes, such as "rtn" or "gptq:order=activation"; see docs/methods.md.
        For an array one that needs no calibration.
    search: "mse" (least-squares scale) or "minmax".

    For a checkpoint only:
    embedding, layers: the format of the embedding and head, and formats by pattern on the tensor
        name, the first match first.
    calibration: what runs through the model where the method asks for it: a text file, a list of
        texts, or token ids [windows, positions]; None: the shipped text.
    samples, length, seed: windows and positions drawn from the text (128 of 512), and how.
    restart: throw an unfinished run to `output` away; without it the run is finished.
    expert_tokens, few_tokens: of a mixture of experts, the tokens of the text that an expert must see
        (None: 128), and what happens to one that sees fewer: "weights", it is rounded by its weights alone
        and named in the report, or "error".
    verify: load what was written and measure its divergence from the source; see measure/verify.py.
    force: replace `output` if it holds a model that lowbit wrote.
    progress: called as (weights done, weights in all, tensor name).
    Returns a PackedMatrix for an array; for a checkpoint a report: output, method,
    bits_per_weight, seconds, peak_rss_bytes, calibration_tokens, layers, experts, measured.
    """
    import dataclasses

    from lowbit.errors import RequestError
    from lowbit.formats import Scheme, parse_format
    from lowbit.formats.auto import Auto

    if not isinstance(source, str) and not hasattr(source, "__fspath__"):
        extra = {"output": output, "embedding": embedding, "layers": layers, "progress": progress}
        extra |= {"calibration": calibration, "samples": samples, "length": length}
        for name, value in extra.items():
            if value is not None:
                raise RequestError(f"quantize: {name} belongs to checkpoints and source is an array; omit it")
        from lowbit.quantize import quantize_array
        from lowbit.quantize.methods import parse_method

        return quantize_array(source, parse_format(format), search, parse_method(method))

    if output is None:
        raise RequestError(
            f"quantize: {str(source)!r} is a checkpoint and output is missing; name the directory to write"
        )
    from lowbit.compress import quantize_checkpoint
    from lowbit.compress.coverage import EXPERT_TOKENS, Coverage
    from lowbit.model.download import resolve

    scheme: Any = format
    if not isinstance(format, Auto):
        scheme = Scheme.parse(format)
        if embedding is not None:
            scheme = dataclasses.replace(scheme, embedding=parse_format(embedding))
    elif embedding is not None or layers is not None:
        raise RequestError("quantize: an Auto chooses every format; give embedding to it, and no layers")
    if layers is not None:
        overrides = {pattern: parse_format(value) for pattern, value in layers.items()}
        scheme = dataclasses.replace(scheme, layers={**overrides, **scheme.layers})
    path = resolve(str(source))
    report = quantize_checkpoint(
        path,
        scheme,
        output,
        search=search,
        progress=progress,
        force=force,
        method=method,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        restart=restart,
        coverage=Coverage(EXPERT_TOKENS if expert_tokens is None else expert_tokens, few_tokens),
    )
    if verify:
        report["measured"] = import_module("lowbit.measure.verify").verify(path, output)
    return report


class _CallableRoom(types.ModuleType):
    """The package `lowbit.quantize` once it is imported: still the function of that name."""

    __call__ = staticmethod(quantize)


class _Package(types.ModuleType):
    """Importing a subpackage sets it as an attribute here; `lowbit.quantize` must stay callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "quantize" and type(value) is types.ModuleType:
            value.__class__ = _CallableRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
import_hook.install()
