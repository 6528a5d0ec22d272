"""Scheme: which format each tensor of a model takes, and what activations and the KV cache hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats.activations import ACTIVATIONS, KV_BITS, default_kv_bits
from lowbit.formats.format import Format
from lowbit.formats.parse import format_from_json, format_to_json, parse_format

EMBEDDING_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
# Small matrices on which much depends, added to the stream or choosing experts: they stay floats.
FLOAT_TENSORS = ("model.embed_positions.weight", "model.layers.*.mlp.router.weight")
_SHORT = re.compile(r"w(\d{1,2})a(\d{1,2})(?:kv(\d{1,2}))?")


@dataclass(frozen=True)
class Scheme:
    """How to quantize a model.

    weights: format of every matrix that nothing below names
    embedding: format of token embedding and output head; None: int6-g32 if weights have less than 8 bits,
        int8-g32 from 8 bits on, and the weights' own format if that is a plain float
    activations: "int8", or "int16" (two int8 limbs)
    kv_bits: bits of keys and values: 16, 8 for attention in integers, 4 or 2 in pages; None: 16 for weights
        in plain floats, default_kv_bits(activations) for all others
    layers: tensor-name pattern (fnmatch, case-sensitive) -> Format; the first match wins, over embedding too

    Routers of experts and tables of learned positions are fp16 unless `layers` names them.
    A Format may be given by its name: Scheme("int4-g64", layers={"*.down_proj.weight": "int6-g64"}).
    """

    quant_method: ClassVar[str] = "lowbit"  # transformers takes a Scheme as quantization_config

    weights: Format
    embedding: Format | None = None
    activations: str = "int8"
    kv_bits: int | None = None
    layers: Mapping[str, Format] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("weights", "embedding"):
            if isinstance(given := getattr(self, name), str):
                object.__setattr__(self, name, parse_format(given))
        if not isinstance(self.weights, Format):
            raise FormatError(
                f"Scheme: weights is {self.weights!r}, must be a Format or its name; Scheme.parse reads more"
            )
        if self.embedding is None:
            object.__setattr__(self, "embedding", _default_embedding(self.weights))
        elif not isinstance(self.embedding, Format):
            raise FormatError(f"Scheme: embedding is {self.embedding!r}, must be a Format, its name or None")
        if self.activations not in ACTIVATIONS:
            raise UnsupportedError(
                f"Scheme: activations {self.activations!r}, must be one of {', '.join(ACTIVATIONS)}"
            )
        if self.kv_bits is None:
            plain = self.weights.float_type is not None
            object.__setattr__(self, "kv_bits", 16 if plain else default_kv_bits(self.activations))
        elif self.kv_bits not in KV_BITS:
            raise UnsupportedError(f"Scheme: kv_bits={self.kv_bits} is not supported; use one of 2, 4, 8, 16")
        layers = {p: parse_format(f) if isinstance(f, str) else f for p, f in self.layers.items()}
        for pattern, fmt in layers.items():
            if not isinstance(pattern, str) or not isinstance(fmt, Format):
                raise FormatError(
                    f"Scheme: layers[{pattern!r}] = {fmt!r}, must map a name pattern to a Format or its name"
                )
        object.__setattr__(self, "layers", layers)

    @staticmethod
    def parse(value: str | Format | Mapping[str, Any] | Scheme) -> Scheme:
        """Return the Scheme of a format name (`int4-g64`), a short form (`w4a8kv16`), a Format or a mapping.

        Short form: w<bits> is int<bits> with its default group (w16: fp16), a8 and a16 are the activations.
        Mapping: the keys of `to_dict`; everything but "weights" may be missing.
        """
        if isinstance(value, Scheme):
            return value
        if isinstance(value, Mapping):
            return Scheme.from_dict(value)
        if isinstance(value, str) and (match := _SHORT.fullmatch(value.strip().lower())):
            weight_bits, activation_bits = int(match[1]), int(match[2])
            if weight_bits not in (*range(1, 9), 16):
                raise UnsupportedError(f"Scheme.parse({value!r}): w{weight_bits}, must be w1 to w8 or w16")
            weights = Format.plain("fp16") if weight_bits == 16 else Format.integer(weight_bits)
            return Scheme(
                weights, activations=f"int{activation_bits}", kv_bits=int(match[3]) if match[3] else None
            )
        return Scheme(parse_format(value))

    def format_for(self, tensor_name: str) -> Format:
        """Return the format of the matrix with this canonical name."""
        for pattern, fmt in self.layers.items():
            if fnmatchcase(tensor_name, pattern):
                return fmt
        if stays_float(tensor_name):
            return Format.plain("fp16") if self.weights.float_type is None else self.weights
        if tensor_name in EMBEDDING_TENSORS:
            assert self.embedding is not None
            return self.embedding
        return self.weights

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict; `Scheme.from_dict` gives the same Scheme back."""
        assert self.embedding is not None
        return {
            "weights": format_to_json(self.weights),
            "embedding": format_to_json(self.embedding),
            "activations": self.activations,
            "kv_bits": self.kv_bits,
            "layers": {pattern: format_to_json(fmt) for pattern, fmt in self.layers.items()},
        }

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Scheme:
        known = {"weights", "embedding", "activations", "kv_bits", "layers"}
        if unknown := set(value) - known:
            raise FormatError(f"Scheme: unknown keys {sorted(map(str, unknown))}; known are {sorted(known)}")
        if "weights" not in value:
            raise FormatError(
                f"Scheme: {dict(value)!r} has no 'weights'; give a format name such as 'int4-g64'"
            )
        layers = value.get("layers") or {}
        if not isinstance(layers, Mapping):
            raise FormatError(f"Scheme: layers is {layers!r}, must map a name pattern to a format")
        embedding = value.get("embedding")
        return Scheme(
            weights=format_from_json(value["weights"]),
            embedding=None if embedding is None else format_from_json(embedding),
            activations=value.get("activations", "int8"),
            kv_bits=value.get("kv_bits"),
            layers={pattern: format_from_json(fmt) for pattern, fmt in layers.items()},
        )


def stays_float(tensor_name: str) -> bool:
    """Is the matrix one that no scheme rounds to codes unless it names it?"""
    return any(fnmatchcase(tensor_name, pattern) for pattern in FLOAT_TENSORS)


def _default_embedding(weights: Format) -> Format:
    if weights.float_type is not None:
        return weights
    return Format.integer(6 if weights.bits < 8 else 8, group_size=32)
