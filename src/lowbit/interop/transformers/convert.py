"""A transformers model takes packed weights: quantized from its own, or from a lowbit directory. And back.

What lowbit takes over are linear modules and embeddings. All other parameters (norms, biases, routers,
embeddings of a kind of their own) stay torch's, with the values that the directory has. So do experts that
transformers stacks in one parameter: they hold the decoded values and take the memory of floats, while their
packed matrices are kept for saving.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.interop.transformers.config import LowbitConfig
from lowbit.interop.transformers.modules import PackedEmbedding, PackedLinear
from lowbit.interop.transformers.packed import PackedTensor, as_array
from lowbit.interop.transformers.places import (
    Model,
    Slot,
    has_tied_head,
    is_embedding,
    is_transposed,
    places,
    slots,
)
from lowbit.model.tensors import HEAD
from lowbit.packed.planned import planned_arrays
from lowbit.quantize.methods import Choice, parse_method
from lowbit.quantize.round_to_nearest import round_to_nearest

if TYPE_CHECKING:
    from lowbit.model.lowbit_checkpoint import LowbitCheckpoint
    from lowbit.model.sources import Source
    from lowbit.packed import PackedMatrix


@dataclass
class Taken:
    """What a model remembers of being taken over, as its attribute `lowbit`.

    found: canonical name -> its place among the parameters as they were
    slots: the modules that were exchanged; their own modules have no weight any more
    stacked: packed matrices of which the model computes with decoded values, by canonical name
    details: lowbit.json of the directory that it was read from, None if it was quantized here
    """

    config: LowbitConfig
    found: dict[str, Source]
    slots: list[Slot] = field(default_factory=list)
    stacked: dict[str, PackedMatrix] = field(default_factory=dict)
    details: dict[str, Any] | None = None


def quantize_model(model: Model, config: Any) -> Model:
    """Quantize a loaded model of floats in place, matrix by matrix, and return it.

    config: a LowbitConfig, a lowbit.Scheme, or what Scheme.parse reads.
    Raises FormatError before anything is changed if a group size does not divide the inputs of a matrix.
    """
    if hasattr(model, "lowbit"):
        raise UnsupportedError("quantize: the model is quantized by lowbit already; start from the floats")
    config = LowbitConfig.of(config)
    method = parse_method(config.method)
    if method.method.calibrated:
        raise UnsupportedError(
            f"quantize on load: method {config.method!r} needs calibration; run `lowbit quantize --method "
            f"{config.method}` and load its directory, or choose rtn or hqq"
        )
    tied = has_tied_head(model)
    found = places(model, tied)
    taken = Taken(config, found, slots(model, found, config.modules_to_not_convert, tied))
    formats = {name: config.scheme.format_for(name) for slot in taken.slots for name in slot.names}
    for slot in taken.slots:
        for name, shape in zip(slot.names, slot.shapes):
            if not formats[name].coded:
                planned_arrays(formats[name], *shape, f"quantize {name}")
    around = (model.get_input_embeddings(), model.get_output_embeddings())
    nearest = parse_method("rtn")
    done: dict[str, PackedTensor] = {}
    for slot in taken.slots:
        inside = slot.module not in around and not is_embedding(slot.module)
        for name, source in slot.parts:
            if name not in done:
                weight = np.ascontiguousarray(source.view(as_array(slot.module.weight)))
                # As `lowbit quantize` does: what is outside the layers and plain floats are rounded.
                choose = method if inside and formats[name].float_type is None else nearest
                done[name] = PackedTensor(choose(weight, formats[name]))
        exchange(model, slot, done, config.scheme.activations)
    _quantize_stacked(model, taken, method)
    _round_floats(model, taken, {*done, *taken.stacked})
    finish(model, taken)
    if getattr(model, "hf_quantizer", None) is None:  # not by way of from_pretrained
        from lowbit.interop.transformers.quantizer import LowbitQuantizer

        model.hf_quantizer = LowbitQuantizer(config, pre_quantized=False)
        model.is_quantized, model.quantization_method = True, "lowbit"
    return model


def _quantize_stacked(model: Model, taken: Taken, method: Choice) -> None:
    """Experts in one parameter: each becomes packed, and its decoded values take the place of its own."""
    tensors = dict(model.named_parameters())
    skipped = taken.config.modules_to_not_convert
    for name, source in taken.found.items():
        tensor = tensors.get(source.stored)
        if source.expert is None or tensor is None or len(source.shape(tuple(tensor.shape))) != 2:
            continue
        if any(fnmatchcase(source.stored.rpartition(".")[0], pattern) for pattern in skipped):
            continue
        format = taken.config.scheme.format_for(name)
        index = tensor.data[source.expert]
        one = replace(source, expert=None)
        weight = np.ascontiguousarray(one.view(as_array(index)))
        choose = method if format.float_type is None else parse_method("rtn")
        taken.stacked[name] = matrix = choose(weight, format)
        values = as_array(index).copy()
        one.put(values, matrix.dequantize())
        index.copy_(torch.from_numpy(values))


def _round_floats(model: Model, taken: Taken, packed: set[str]) -> None:
    """Routers and positions that a scheme keeps as fp16 become that, as `lowbit quantize` stores them."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    skipped = taken.config.modules_to_not_convert
    for name, source in taken.found.items():
        format = taken.config.scheme.format_for(name)
        if any(fnmatchcase(source.stored.rpartition(".")[0], pattern) for pattern in skipped):
            continue
        if name not in packed and source.whole and format.float_type is not None and not format.coded:
            tensor = tensors[source.stored].data
            if tensor.ndim == 2:
                rounded = round_to_nearest(as_array(tensor), format).dequantize()
                tensor.copy_(torch.from_numpy(rounded))


def vacate(model: Model, checkpoint: LowbitCheckpoint, config: LowbitConfig) -> Taken:
    """Before transformers loads: take away the weights that `fill` brings packed, so that it makes none."""
    stored = set(checkpoint.names())
    tied = has_tied_head(model) and HEAD not in stored
    found = places(model, tied)
    taken = Taken(config, found, details=checkpoint.details)
    for slot in slots(model, found, config.modules_to_not_convert, tied):
        if stored.issuperset(slot.names):
            empty = torch.empty(0, dtype=slot.module.weight.dtype, device="cpu")
            slot.module.weight = nn.Parameter(empty, requires_grad=False)
            slot.module._is_hf_initialized = True
            taken.slots.append(slot)
    # Nothing is left that transformers could tie.
    model.all_tied_weights_keys = {}
    model.tie_weights = _tied_already
    return taken


def fill(model: Model, checkpoint: LowbitCheckpoint, taken: Taken) -> Model:
    """After transformers has loaded: everything comes from the lowbit directory.

    Raises CheckpointError if a parameter has no value there, or a stored tensor no place here.
    """
    stored = set(checkpoint.names())
    unused = set(stored)
    packed: dict[str, PackedTensor] = {}
    for slot in taken.slots:
        for name, shape in zip(slot.names, slot.shapes):
            if name not in packed:
                matrix = checkpoint.matrix(name)
                if matrix.shape != shape:
                    raise CheckpointError(
                        f"load {checkpoint.path}: {name} is {list(matrix.shape)}, but the config asks for "
                        f"{list(shape)}; config and weights belong to different models"
                    )
                packed[name] = PackedTensor(matrix)
        unused.difference_update(slot.names)
        exchange(model, slot, packed, taken.config.scheme.activations)
    left: dict[str, dict[str, Source]] = {}
    for name, source in taken.found.items():
        if name not in packed:
            left.setdefault(source.stored, {})[name] = source
    for name, source in taken.found.items():
        if source.expert is not None and name in stored and len(checkpoint.shape(name)) == 2:
            taken.stacked[name] = checkpoint.matrix(name)
    for target, parts in left.items():
        missing = [name for name in parts if name not in stored]
        if missing:
            raise CheckpointError(
                f"load {checkpoint.path}: {', '.join(missing[:4])} for {target} of {type(model).__name__} "
                "is missing; the directory holds another model or another head"
            )
        unused.difference_update(parts)
        _set(model, target, parts, checkpoint)
    if model.get_output_embeddings() is None:
        unused.discard(HEAD)
    if unused:
        raise CheckpointError(
            f"load {checkpoint.path}: {len(unused)} tensors have no place in {type(model).__name__}: "
            f"{', '.join(sorted(unused)[:4])}; load it with the class that it was made for"
        )
    return finish(model, taken)


def exchange(model: Model, slot: Slot, packed: dict[str, PackedTensor], activations: str) -> None:
    """Put a packed module where the slot's module stands."""
    old, parts = slot.module, [packed[name] for name in slot.names]
    new: nn.Module
    if is_embedding(old):
        scale = getattr(old, "scalar_embed_scale", None)  # transformers 5 makes the buffer itself anew
        if scale is not None:
            old.embed_scale = torch.tensor(float(scale))
        elif hasattr(old, "embed_scale"):
            scale = float(old.embed_scale)
        new = PackedEmbedding(parts[0], slot.names[0], old.weight.dtype, scale)
    else:
        new = PackedLinear(parts, slot.names, activations, slot.order, old.bias)
    old.weight = None  # frees the floats; the slot keeps the module for dequantize_model
    replace_module(model, slot.path, new.train(old.training))


def dequantize_model(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Give the modules their floats back, decoded: the network that the packed one approximates."""
    taken: Taken = model.lowbit
    done: dict[str, nn.Parameter] = {}
    for slot in taken.slots:
        new, old = model.get_submodule(slot.path), slot.module
        key = slot.names[0]
        if key not in done:
            weight = new.dequantize()
            weight = (weight.T if is_transposed(old) else weight).contiguous()
            done[key] = nn.Parameter(weight.to(dtype or model.dtype))
        old.weight = done[key]
        if getattr(new, "bias", None) is not None:
            old.bias = new.bias
        replace_module(model, slot.path, old.train(new.training))
    del model.lowbit
    for name in ("tie_weights", "save_pretrained"):
        model.__dict__.pop(name, None)
    return model


def finish(model: Model, taken: Taken) -> Model:
    from functools import partial

    from lowbit.interop.transformers.save import save_pretrained

    model.lowbit = taken
    model.config.quantization_config = taken.config  # transformers 4 leaves what it was given there
    model.all_tied_weights_keys = {}
    model.tie_weights = _tied_already
    model.save_pretrained = partial(save_pretrained, model)
    return model


def _tied_already(*args: Any, **kwargs: Any) -> None:
    """tie_weights of a packed model: its head reads the embedding's matrix."""


def _set(model: Model, target: str, parts: dict[str, Source], checkpoint: LowbitCheckpoint) -> None:
    """Give a parameter or buffer of floats its value, put together from its parts."""
    path, _, name = target.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, name)
    value = np.empty(tuple(old.shape), np.float32)
    for canonical, source in parts.items():
        found = checkpoint.read(canonical)
        if found.shape != source.shape(tuple(old.shape)):
            raise CheckpointError(
                f"load {checkpoint.path}: {canonical} is {list(found.shape)}, which does not fit {target} "
                f"{list(old.shape)}; config and weights belong to different models"
            )
        source.put(value, found)
    tensor = torch.from_numpy(value).to(old.dtype)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, name, tensor)


def replace_module(model: Model, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).add_module(name, new)
