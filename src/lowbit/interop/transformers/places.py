"""Which of lowbit's tensors each parameter of a transformers model holds.

A lowbit directory has canonical names (model/tensors.py) and keeps apart what some modules fuse; sources.py
knows both for the families that lowbit runs. Any other network keeps the names of its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.config import from_transformers
from lowbit.model.sources import Source, sources

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# A transformers.PreTrainedModel. To type checkers every attribute of a module is a tensor or a module, which
# few of those that are asked for here are; modules of it are Any for the same reason.
Model = Any


@dataclass(frozen=True, eq=False)
class Slot:
    """A module whose weight lowbit can take over.

    path: its name in the model
    parts: (canonical name, where in the weight it lies)
    shapes: of the parts, [out_features, in_features]
    order: row r of the weight is row order[r] of the parts one under the other; None: r itself
    """

    path: str
    module: Any
    parts: tuple[tuple[str, Source], ...]
    shapes: tuple[tuple[int, int], ...]
    order: np.ndarray | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)


def describe(model: Model) -> Any | None:
    """The ModelConfig of the model; None for a network that lowbit's own engine does not run."""
    fields = model.config.to_dict()
    fields.pop("quantization_config", None)
    try:
        return from_transformers(fields, where=f"the config of {type(model).__name__}")
    except (UnsupportedError, CheckpointError):
        return None


def places(model: Model, tied: bool) -> dict[str, Source]:
    """Canonical name -> where in the model's parameters and stored buffers it lies.

    tied: leave the output head out, whose weights are the embedding's.
    """
    stored = list(model.state_dict())
    if tied:
        stored.remove(f"{path_of(model, model.get_output_embeddings())}.weight")
    config = describe(model)
    if config is not None:
        return sources(config, stored)
    modules = dict(model.named_modules())
    return {
        name: Source(name, transposed=is_transposed(modules.get(name.removesuffix(".weight"))))
        for name in stored
    }


def slots(model: Model, found: Mapping[str, Source], skipped: Sequence[str], tied: bool) -> list[Slot]:
    """The modules to take over: linear ones, GPT-2's Conv1D and embeddings, but none that `skipped` matches.

    A tied head has the parts of the embedding.
    """
    held: dict[str, list[tuple[str, Source]]] = {}
    for name, source in found.items():
        held.setdefault(source.stored, []).append((name, source))
    result = []
    for path, module in model.named_modules():
        if any(fnmatchcase(path, pattern) for pattern in skipped):
            continue
        if (slot := _slot(path, module, held.get(f"{path}.weight", []))) is not None:
            result.append(slot)
    if tied:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        for slot in list(result):
            if slot.module is embedding:
                result.append(replace(slot, path=path_of(model, head), module=head))
    return result


def _slot(path: str, module: Any, parts: list[tuple[str, Source]]) -> Slot | None:
    if not parts or not (is_linear(module) or is_embedding(module)):
        return None
    if is_embedding(module) and not (len(parts) == 1 and parts[0][1].whole):
        return None
    if any(source.transposed != is_transposed(module) for _, source in parts):
        raise CheckpointError(f"quantize {path}: its weight lies otherwise than the table of names says")
    shape = tuple(module.weight.shape)
    shapes = tuple(source.shape(shape) for _, source in parts)
    out_features = shape[1] if is_transposed(module) else shape[0]
    rows = [np.arange(out_features)[() if s.rows is None else s.rows] for _, s in parts]
    stacked, natural = np.concatenate(rows), np.arange(out_features)
    if not np.array_equal(np.sort(stacked), natural):
        names = ", ".join(name for name, _ in parts)
        raise CheckpointError(f"quantize {path}: {names} are not all of its {out_features} rows")
    order = None if np.array_equal(stacked, natural) else np.argsort(stacked)
    return Slot(path, module, tuple(parts), shapes, order)  # type: ignore[arg-type]


def has_tied_head(model: Model) -> bool:
    """Are the weights of the output head those of the embedding?"""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or not is_linear(head):
        return False
    if head.weight is not None and head.weight is embedding.weight:
        return True
    return bool(getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False))


def path_of(model: Model, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def is_linear(module: nn.Module) -> bool:
    """Exact types: what a subclass computes is not known."""
    return type(module) is nn.Linear or type(module) is Conv1D


def is_transposed(module: nn.Module | None) -> bool:
    return type(module) is Conv1D


def is_embedding(module: Any) -> bool:
    """Plain, or with a factor (Gemma). Other subclasses move their ids (OPT's positions) and stay floats."""
    if type(module) is nn.Embedding:
        return module.max_norm is None
    return isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
