"""A checkpoint becomes a decoder that runs: every described tensor is found, checked and handed over.

The native decoder is set up from the ModelConfig alone, so a family needs no code here. What the
description wants and the checkpoint lacks is an error, and so is a tensor that nothing would use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.errors import CheckpointError, RequestError, UnsupportedError
from lowbit.formats.activations import KV_BITS, default_kv_bits
from lowbit.model.config import ModelConfig
from lowbit.model.lowbit_checkpoint import LowbitCheckpoint
from lowbit.model.rope import inverse_frequencies
from lowbit.model.tensors import EMBEDDING, HEAD, IGNORABLE, Expected, expected_tensors
from lowbit.packed import PackedMatrix

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint
    from lowbit.model.tokenizer import Tokenizer

INTEGER_KINDS = (
    "codes",
    "sparse_codes",
    "gathered",
)  # of terms: they multiply activations that were rounded to integers
ACTIVATION_BITS = {"int8": 8, "int16": 16}


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to run; the weights are shared with the decoder, not copied."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None  # None: the checkpoint has none, and only token ids can be used
    decoder: Any  # _native.Decoder
    weights: dict[str, PackedMatrix]  # matrices by canonical name; a tied head appears once, as the embedding
    context: int  # positions of one sequence, at most
    activations: str  # "int8" | "int16"
    kv_bits: int  # of keys and values: 2 | 4 | 8 | 16
    nbytes: int  # of all weights, norms and biases included
    bits_per_weight: float  # 8 * nbytes over the number of weights

    def cache(self, capacity: int | None = None) -> Any:
        """A new, empty _native.KvCache for one sequence; its memory is taken as it fills."""
        from lowbit import _native

        return _native.KvCache(self.decoder, self.context if capacity is None else capacity)


def load_model(
    source: str | PathLike[str] | Checkpoint,
    activations: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv_bits: int | None = None,
) -> LoadedModel:
    """Load a checkpoint for the CPU.

    source: a transformers directory, a .gguf file, a lowbit directory, or an open Checkpoint.
    activations: "int8", or "int16" for activations of two int8 limbs; None: what the model was quantized for,
        "int8" where that is not known.
    context: positions that one sequence may hold; None: those of the published checkpoint. The dynamic
        rope scaling depends on it, see rope.inverse_frequencies.
    threads: of all native work in this process; None: as it is.
    kv_bits: of keys and values: 16, 8 for attention in integers, 4 or 2 in pages; None: what the model was
        quantized for; else 8 where coded weights meet int8 activations, 16 with int16 ones and in a model of
        plain floats, whose results stay those of floats.
    Raises CheckpointError, UnsupportedError or RequestError; nothing is loaded halfway.
    """
    from lowbit import _native
    from lowbit.kernels import tuning
    from lowbit.model.checkpoint import open_checkpoint

    if activations not in (None, *ACTIVATION_BITS):
        raise RequestError(f"load: activations={activations!r}; use one of {', '.join(ACTIVATION_BITS)}")
    if kv_bits not in (None, *KV_BITS):
        raise RequestError(f"load: kv_bits={kv_bits}; use one of 2, 4, 8, 16, or none for the default")
    if threads is not None:
        if threads < 1:
            raise RequestError(f"load: threads={threads}; use at least 1, or none for the default")
        _native.set_threads(threads)
    tuning.apply()
    if not isinstance(source, (str, PathLike)):
        return _load(source, activations, context, kv_bits)
    with open_checkpoint(source) as checkpoint:
        return _load(checkpoint, activations, context, kv_bits)


def _load(
    checkpoint: Checkpoint, activations: str | None, context: int | None, kv_bits: int | None
) -> LoadedModel:
    activations, kv_bits = _numbers(checkpoint, activations, kv_bits)
    config = checkpoint.config
    positions = _context(config, context)
    config, expected = check_coverage(checkpoint, config)
    weights: dict[str, PackedMatrix] = {}
    vectors: dict[str, np.ndarray] = {}
    for tensor in expected:
        if len(tensor.shape) == 1:
            vectors[tensor.name] = _finite_vector(checkpoint.read(tensor.name), tensor.name)
            if tensor.name.endswith("norm.weight"):
                vectors[tensor.name] += np.float32(config.norm_offset)
        else:
            weights[tensor.name] = matrix = checkpoint.matrix(tensor.name)
            _check_finite(matrix, tensor.name)
    if HEAD in weights and config.tied:  # a tied checkpoint that stores the head as well
        if _same(weights[HEAD], weights[EMBEDDING]):
            del weights[HEAD]
        else:
            config = replace(config, tied=False)

    if kv_bits is None:
        coded = any(term.kind in INTEGER_KINDS for matrix in weights.values() for term in matrix.terms)
        kv_bits = default_kv_bits(activations) if coded else 16
    nbytes = sum(matrix.nbytes for matrix in weights.values()) + sum(v.nbytes for v in vectors.values())
    count = sum(m.out_features * m.in_features for m in weights.values()) + sum(
        v.size for v in vectors.values()
    )
    native = {tensor.name: tensor.native for tensor in expected}
    return LoadedModel(
        path=Path(checkpoint.path),
        config=config,
        tokenizer=checkpoint.tokenizer(),
        decoder=_build(config, native, weights, vectors, positions, ACTIVATION_BITS[activations], kv_bits),
        weights=weights,
        context=positions,
        activations=activations,
        kv_bits=kv_bits,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / count,
    )


def _numbers(checkpoint: Checkpoint, activations: str | None, kv_bits: int | None) -> tuple[str, int | None]:
    """Activations and KV bits: those asked for, or those of the scheme that the directory was made with."""
    known = checkpoint.numbers() if isinstance(checkpoint, LowbitCheckpoint) else None
    if known is None:
        return activations or "int8", kv_bits
    if kv_bits is None and activations in (None, known[0]):
        kv_bits = known[1]
    return activations or known[0], kv_bits


def _context(config: ModelConfig, context: int | None) -> int:
    if context is None:
        return config.max_position
    if not 1 <= context <= config.max_context:
        raise RequestError(
            f"load: context={context}; this model runs from 1 to {config.max_context} positions "
            f"(rope scaling {config.rope.kind})"
        )
    return context


def check_coverage(checkpoint: Checkpoint, config: ModelConfig) -> tuple[ModelConfig, list[Expected]]:
    """The tensors to load. Raises unless the checkpoint has exactly what the description needs."""
    names = checkpoint.names()
    present = set(names)
    expected = expected_tensors(config)
    if config.tied and HEAD in present:
        expected.append(Expected(HEAD, "head", (config.vocab_size, config.hidden_size)))
    missing = [tensor.name for tensor in expected if tensor.name not in present]
    if missing:
        hint = "; an output head is shared only with tie_word_embeddings=true" if missing == [HEAD] else ""
        raise CheckpointError(
            f"load {checkpoint.path}: {len(missing)} of {len(expected)} tensors are missing: "
            f"{_some(missing)}; the "
            f"file is incomplete or its config describes another network{hint}"
        )
    wanted = {tensor.name for tensor in expected}
    unknown = [
        name
        for name in names
        if name not in wanted and not any(fnmatchcase(name, pattern) for pattern in IGNORABLE)
    ]
    if unknown:
        raise UnsupportedError(
            f"load {checkpoint.path}: {len(unknown)} tensors have no place in a {config.family} network of "
            f"{config.n_layers} layers: {_some(unknown)}; lowbit does not leave weights out silently"
        )
    for tensor in expected:
        shape = tuple(checkpoint.shape(tensor.name))
        if shape != tensor.shape:
            raise CheckpointError(
                f"load {checkpoint.path}: {tensor.name} has shape {list(shape)}, but the config asks for "
                f"{list(tensor.shape)}; config and weights belong to different models"
            )
    return config, expected


def _build(
    config: ModelConfig,
    native: dict[str, str],
    weights: dict[str, PackedMatrix],
    vectors: dict[str, np.ndarray],
    context: int,
    activation_bits: int,
    kv_bits: int,
) -> Any:
    """The native decoder of the described network; its own limits surface as UnsupportedError."""
    from lowbit import _native

    spec = _native.DecoderSpec()
    for name in (
        "n_layers",
        "hidden_size",
        "intermediate_size",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "vocab_size",
        "norm_eps",
        "activation",
        "gated",
        "norm",
        "norm_place",
        "qk_norm",
        "qk_norm_whole",
        "sub_norm",
        "parallel",
        "positions",
        "position_offset",
        "embedding_scale",
        "attention_scale",
        "attention_softcap",
        "logit_softcap",
        "sinks",
        "n_experts",
        "experts_per_token",
        "expert_size",
        "router_order",
        "router_renormalize",
    ):
        setattr(spec, name, getattr(config, name))
    spec.sparse_layers = list(config.sparse_layers)
    spec.activation_bits = activation_bits
    spec.kv_bits = kv_bits
    spec.rotary_dim = config.rope.rotary_dim
    try:
        decoder = _native.Decoder(spec)
        for name, matrix in weights.items():
            decoder.set_matrix(native[name], matrix.native())
        if config.tied:
            decoder.set_matrix("head", weights[EMBEDDING].native())
        for name, vector in vectors.items():
            decoder.set_vector(native[name], vector)
        decoder.set_rope(*inverse_frequencies(config, context), list(config.rope_layers))
        if config.rope_local is not None:
            local = inverse_frequencies(config, context, config.rope_local)
            decoder.set_local_rope(*local, list(config.local_layers))
        decoder.set_windows(list(config.windows))
        decoder.finish()
    except ValueError as error:
        raise UnsupportedError(
            f"load: the native decoder does not run this {config.family} network: {error}"
        ) from error
    return decoder


def _finite_vector(vector: np.ndarray, name: str) -> np.ndarray:
    vector = np.ascontiguousarray(vector, np.float32)
    bad = np.flatnonzero(~np.isfinite(vector))
    if bad.size:
        raise CheckpointError(
            f"load: {name}[{bad[0]}] is {vector[bad[0]]}, and {bad.size} values of it are not finite; "
            "the checkpoint is damaged or its training diverged"
        )
    return vector


# Stored numbers whose bits under `mask` are all set are NaN or infinite: dtype of the bits, mask.
_NOT_FINITE = {
    "fp32": (np.uint32, 0x7F800000),
    "fp16": (np.uint16, 0x7C00),
    "bf16": (np.uint16, 0x7F80),
    "e8m0": (np.uint8, 0xFF),
    "e4m3": (np.uint8, 0x7F),
}


def _check_finite(matrix: PackedMatrix, name: str) -> None:
    """Raise if a float weight, a scale or an offset is NaN or infinite: it would poison every output."""
    for term in matrix.terms:
        for what, kind, array in term.numbers():
            dtype, mask = _NOT_FINITE[kind]
            for block, part in enumerate(array.view(dtype)):
                if int((part & dtype(mask)).max(initial=0)) == mask:
                    raise CheckpointError(
                        f"load: {what} of {name} are not finite in rows {32 * block} to {32 * block + 31}; "
                        "the checkpoint is damaged or its training diverged"
                    )


def _same(a: PackedMatrix, b: PackedMatrix) -> bool:
    """Are two matrices stored by the same bits?"""
    if a.shape != b.shape or len(a.terms) != len(b.terms):
        return False
    for one, other in zip(a.terms, b.terms):
        first, second = dict(one.arrays()), dict(other.arrays())
        if (one.kind, one.meta()) != (other.kind, other.meta()) or first.keys() != second.keys():
            return False
        if any(
            first[key].dtype != second[key].dtype or not np.array_equal(first[key], second[key])
            for key in first
        ):
            return False
    return True


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
