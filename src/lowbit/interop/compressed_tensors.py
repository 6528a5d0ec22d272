"""compressed-tensors: what vLLM, SGLang and transformers load.

    int2 .. int8, with or without zero-points, groups or rows    pack-quantized
    w8a8      int8 by rows, activations int8 per token           int-quantized
    fp8       e4m3 by rows, activations e4m3 per token           float-quantized
    w4a16 ..  the short names of the tool: int4-g128 ..

Codes are packed densely: 3, 5, 6 and 7 bits are read by compressed-tensors from 0.18 on, 2, 4 and 8 bits by
all versions. Scales are fp16, or float32 where fp16 does not hold them.
Layouts: model/stored/compressed_tensors.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import RequestError
from lowbit.formats import parse_format
from lowbit.interop.coded import Shape, coded, pack_words, shape_of
from lowbit.interop.integers import halves
from lowbit.interop.module import Layout, Packing, Seen, default_format
from lowbit.packed import CodeTerm, PackedMatrix

_SHORT = {f"w{bits}a16": f"int{bits}-g128" for bits in (2, 3, 4, 5, 6, 7, 8)}
_FP8 = "e4m3fn-row"
_FP8_LEVELS = parse_format(_FP8).tables[0]


@dataclass(frozen=True)
class Packed:
    """pack-quantized, or with `activations` int-quantized rows of int8."""

    shape: Shape
    activations: bool = False

    @property
    def format(self) -> str:
        return self.shape.name

    @property
    def bits_per_weight(self) -> float:
        scale = 16 if self.shape.half else 32
        each = scale + (0 if self.shape.symmetric else self.shape.bits)
        return self.shape.bits + (each / self.shape.group if self.shape.group else 0.0)

    def layout(self, rows: int, columns: int) -> Layout:
        bits, groups = self.shape.bits, columns // self.shape.group if self.shape.group else 1
        scale = ("F16" if self.shape.half else "F32", (rows, groups))
        if self.activations:
            return {"weight": ("I8", (rows, columns)), "weight_scale": scale}
        layout: Layout = {
            "weight_packed": ("I32", (rows, -(-columns * bits // 32))),
            "weight_scale": scale,
            "weight_shape": ("I64", (2,)),
        }
        if not self.shape.symmetric:
            layout["weight_zero_point"] = ("I32", (-(-rows * bits // 32), groups))
        return layout

    def arrays(self, matrices: Sequence[PackedMatrix]) -> dict[str, np.ndarray] | None:
        found = coded(matrices, self.shape)
        if found is None:
            return None
        scales = halves(found.scales) if self.shape.half else found.scales
        assert scales is not None
        if self.activations:
            return {"weight": (found.codes ^ 0x80).view(np.int8), "weight_scale": scales}
        arrays = {
            "weight_packed": pack_words(found.codes, self.shape.bits),
            "weight_scale": scales,
            "weight_shape": np.array(found.codes.shape, np.int64),
        }
        if not self.shape.symmetric:
            zero_points = np.ascontiguousarray(found.zero_points.T)
            arrays["weight_zero_point"] = np.ascontiguousarray(pack_words(zero_points, self.shape.bits).T)
        return arrays

    def scheme(self) -> dict[str, Any]:
        weights = {
            "num_bits": self.shape.bits,
            "type": "int",
            "symmetric": self.shape.symmetric,
            "strategy": "group" if self.shape.group else "channel",
            "group_size": self.shape.group or None,
            "dynamic": False,
        }
        kind = "int-quantized" if self.activations else "pack-quantized"
        return {
            "weights": weights,
            "input_activations": _tokens("int") if self.activations else None,
            "format": kind,
        }


@dataclass(frozen=True)
class Float8:
    """float-quantized: e4m3 with a scale for each row."""

    half: bool
    activations: bool
    format: str = _FP8
    bits_per_weight: float = 8.0

    def layout(self, rows: int, columns: int) -> Layout:
        scale = "F16" if self.half else "F32"
        return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": (scale, (rows, 1))}

    def arrays(self, matrices: Sequence[PackedMatrix]) -> dict[str, np.ndarray] | None:
        codes, scales = [], []
        for matrix in matrices:
            term = _float8_term(matrix)
            if term is None:
                return None
            codes.append(term.unpack(*matrix.shape))
            scales.append(term.effective_scales(matrix.out_features))
        scale = np.concatenate(scales)
        stored = halves(scale) if self.half else scale
        return None if stored is None else {"weight": np.concatenate(codes), "weight_scale": stored}

    def scheme(self) -> dict[str, Any]:
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
        return {
            "weights": weights,
            "input_activations": _tokens("float") if self.activations else None,
            "format": "float-quantized",
        }


def _tokens(kind: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


def _float8_term(matrix: PackedMatrix) -> CodeTerm | None:
    term = matrix.terms[0]
    if (
        len(matrix.terms) > 1
        or not isinstance(term, CodeTerm)
        or term.group_size
        or term.zero_points is not None
    ):
        return None
    if term.offsets is not None or len(term.levels) > 1 or tuple(term.levels[0]) != _FP8_LEVELS:
        return None
    return term


def settle(layers: Mapping[str, Seen], format: str | None) -> dict[str, Packing]:
    """Each layer in its own format where it is stored in one; floats in the one asked for."""
    wanted = _wanted(format) if format else None
    usual = wanted or _wanted(default_format(layers))
    return {name: _own(layer, wanted) or usual for name, layer in layers.items()}


def _own(layer: Seen, wanted: Packing | None) -> Packing | None:
    if layer.floats:
        return None
    if isinstance(wanted, Float8) or all(_float8_term(matrix) is not None for matrix in layer.matrices):
        if any(_float8_term(matrix) is None for matrix in layer.matrices):
            return None
        half = all(
            halves(t.effective_scales(m.out_features)) is not None
            for m in layer.matrices
            for t in (_float8_term(m),)
            if t is not None
        )
        return Float8(half, isinstance(wanted, Float8) and wanted.activations)
    shapes = [shape_of(matrix) for matrix in layer.matrices]
    if any(shape is None for shape in shapes):
        return None
    found = [shape for shape in shapes if shape is not None]
    shape = Shape(
        max(2, *(s.bits for s in found)),
        min((s.group for s in found), key=lambda g: g or layer.shape[1]),
        all(s.symmetric for s in found),
        all(s.half for s in found),
    )
    if isinstance(wanted, Packed):
        return _joined(shape, wanted, layer.shape[1])
    return Packed(shape)


def _joined(shape: Shape, wanted: Packed, columns: int) -> Packing | None:
    """The wanted shape where it holds this one, with scales of the type they need."""
    asked = wanted.shape
    finer = (asked.group or columns) <= (shape.group or columns) or asked.group == shape.group
    if shape.bits > asked.bits or not finer or (asked.symmetric and not shape.symmetric):
        return None
    return Packed(Shape(asked.bits, asked.group, asked.symmetric, shape.half), wanted.activations)


def _wanted(format: str) -> Packing:
    text = _SHORT.get(format.lower(), format.lower())
    if text in ("fp8", _FP8):
        return Float8(True, text == "fp8")
    if text == "w8a8":
        return Packed(Shape(8, 0, True, True), True)
    parsed = parse_format(text)
    integer = parsed.name.startswith("int") and parsed.scale_type == "fp16" and 2 <= parsed.bits <= 8
    if not integer or parsed.name.startswith(f"int{parsed.bits}b"):
        raise RequestError(
            f"export: compressed-tensors:{format} is not written; choose int2 .. int8 with -g or -row, "
            f"{', '.join(_SHORT)}, w8a8 or fp8"
        )
    return Packed(Shape(parsed.bits, parsed.group_size, not parsed.zero_point, True))


def quantization_config(packings: Mapping[str, Packing], kept: Sequence[str]) -> dict[str, Any]:
    """Layers of one scheme share a group; with one scheme it targets every Linear that is not kept."""
    schemes: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, packing in packings.items():
        assert isinstance(packing, (Packed, Float8))
        scheme = packing.scheme()
        schemes.setdefault(repr(scheme), (scheme, []))[1].append(name)
    groups = {
        f"group_{number}": {**scheme, "targets": ["Linear"] if len(schemes) == 1 else names}
        for number, (scheme, names) in enumerate(schemes.values())
    }
    formats = {scheme["format"] for scheme, _ in schemes.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(kept),
    }
