"""Codes, levels and scales, with the checks that make them safe to multiply with.

A code term is  w[o, i] = tensor_scale * scales[o, i / g] * (levels[codes[o, i]] - zero_points[o, i / g])
+ offsets[o, i / g].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats.scales import decode_scales
from lowbit.packed.layout import (
    BLOCK_ROWS,
    PLANES,
    block_count,
    check_group_size,
    codes_shape,
    group_count,
    pack_codes,
    unpack_codes,
    unpack_groups,
)
from lowbit.packed.term import check_array, integer, permute_groups

SCALE_DTYPES = {"fp16": np.float16, "fp32": np.float32, "e8m0": np.uint8, "e4m3": np.uint8}
OFFSET_DTYPES = {"fp16": np.float16, "fp32": np.float32}
MAX_TABLES = 4


@dataclass(frozen=True, eq=False)
class CodeTerm:
    """One term of codes, levels and scales.

    bits: width of a stored code, 1..8
    levels: float32 [tables, n], n <= 2**bits, in code order; up to 4 tables of at most 16 levels
    codes: uint8 [blocks, chunks, 2, 64 * bits]
    scales: float16 | float32 | uint8 (e8m0, e4m3) [blocks, groups, 32]; padded rows hold 0
    scale_type: "fp16" | "fp32" | "e8m0" | "e4m3"
    group_size: inputs that share a scale, a multiple of 16; 0: the whole row
    zero_points: uint8 [blocks, groups, 32] in code units, or None
    offsets: float16 | float32 [blocks, groups, 32], or None
    selectors: uint8 [blocks, groups, 32], which table a group uses, or None with one table
    tensor_scale: multiplies every scale
    """

    kind: ClassVar[str] = "codes"
    bits: int
    levels: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    scale_type: str
    group_size: int
    zero_points: np.ndarray | None = None
    offsets: np.ndarray | None = None
    selectors: np.ndarray | None = None
    tensor_scale: float = 1.0

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """The stored arrays by name, large ones first."""
        for name in ("codes", "scales", "offsets", "zero_points", "selectors", "levels"):
            array = getattr(self, name)
            if array is not None:
                yield name, array

    def numbers(self) -> Iterator[tuple[str, str, np.ndarray]]:
        yield "scales", self.scale_type, self.scales
        if self.offsets is not None:
            yield "offsets", self.offset_type or "fp16", self.offsets

    def meta(self) -> dict[str, Any]:
        names = ("bits", "scale_type", "group_size", "tensor_scale")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> "CodeTerm":
        optional = {name: arrays.pop(name, None) for name in ("zero_points", "offsets", "selectors")}
        return cls(
            bits=integer(meta["bits"]),
            levels=arrays.pop("levels"),
            codes=arrays.pop("codes"),
            scales=arrays.pop("scales"),
            scale_type=meta["scale_type"],
            group_size=integer(meta["group_size"]),
            tensor_scale=float(meta["tensor_scale"]),
            **optional,
        )

    @property
    def offset_type(self) -> str | None:
        if self.offsets is None:
            return None
        return "fp16" if self.offsets.dtype == np.float16 else "fp32"

    def check(self, out_features: int, in_features: int) -> None:
        """Raise FormatError unless every array has the dtype and shape of this matrix."""
        if self.bits not in PLANES:
            raise FormatError(f"code term: bits={self.bits}, but stored codes have 1 to 8 bits")
        if self.scale_type not in SCALE_DTYPES:
            raise FormatError(
                f"code term: scale type {self.scale_type!r}; use one of {', '.join(SCALE_DTYPES)}"
            )
        check_group_size(in_features, self.group_size, "code term")
        groups = (block_count(out_features), group_count(in_features, self.group_size), BLOCK_ROWS)
        check_array("codes", self.codes, (np.uint8,), codes_shape(out_features, in_features, self.bits))
        check_array("scales", self.scales, (SCALE_DTYPES[self.scale_type],), groups)
        for name, dtypes in (
            ("zero_points", (np.uint8,)),
            ("offsets", (np.float16, np.float32)),
            ("selectors", (np.uint8,)),
        ):
            array = getattr(self, name)
            if array is not None:
                check_array(name, array, dtypes, groups)
        self._check_levels()
        if not np.isfinite(self.tensor_scale):
            raise FormatError(f"code term: tensor_scale={self.tensor_scale}; it must be finite")

    def _check_levels(self) -> None:
        levels = self.levels
        limit = 16 if levels.ndim == 2 and levels.shape[0] > 1 else 1 << self.bits
        if (
            levels.ndim != 2
            or levels.dtype != np.float32
            or not 1 <= levels.shape[0] <= MAX_TABLES
            or not 1 <= levels.shape[1] <= min(limit, 1 << self.bits)
        ):
            raise FormatError(
                f"code term: levels are {levels.dtype} {list(levels.shape)}; a {self.bits}-bit term has "
                f"float32 [1, up to {1 << self.bits}], or [up to 4 tables, up to 16]"
            )
        if not np.isfinite(levels).all():
            raise FormatError("code term: a level is not finite; leave out NaN and infinities")
        if (self.selectors is None) != (levels.shape[0] == 1):
            raise FormatError(
                f"code term: {levels.shape[0]} tables and selectors "
                f"{'absent' if self.selectors is None else 'present'}; selectors choose among 2 to 4 tables"
            )
        if self.selectors is not None and int(self.selectors.max(initial=0)) >= levels.shape[0]:
            raise FormatError(
                f"code term: selector {int(self.selectors.max())} with {levels.shape[0]} tables; "
                "selectors count from 0"
            )

    def dequantize(self, out_features: int, in_features: int) -> np.ndarray:
        """float32 [out_features, in_features]: (scale * tensor_scale) * (level - zero_point) + offset."""
        codes = unpack_codes(self.codes, out_features, in_features, self.bits)
        if codes.size and int(codes.max()) >= self.levels.shape[1]:
            raise FormatError(
                f"dequantize: code {int(codes.max())}, but the table has {self.levels.shape[1]} levels; "
                "the codes are damaged"
            )
        groups = group_count(in_features, self.group_size)
        grouped = codes.reshape(out_features, groups, -1)
        if self.selectors is None:
            values = self.levels[0][grouped]
        else:
            values = self.levels[unpack_groups(self.selectors, out_features)[:, :, None], grouped]
        if self.zero_points is not None:
            values -= unpack_groups(self.zero_points, out_features)[:, :, None].astype(np.float32)
        values *= self.effective_scales(out_features)[:, :, None]
        if self.offsets is not None:
            values += unpack_groups(self.offsets, out_features)[:, :, None].astype(np.float32)
        return values.reshape(out_features, in_features)

    def effective_scales(self, out_features: int) -> np.ndarray:
        """scale * tensor_scale, float32 [out_features, groups]."""
        scales = decode_scales(unpack_groups(self.scales, out_features), self.scale_type)
        return scales.astype(np.float32, copy=False) * np.float32(self.tensor_scale)

    def permute_rows(self, index: np.ndarray, in_features: int) -> "CodeTerm":
        codes = unpack_codes(self.codes, len(index), in_features, self.bits)
        changed: dict[str, Any] = {
            name: permute_groups(array, index)
            for name, array in self.arrays()
            if name not in ("codes", "levels")
        }
        return replace(self, codes=pack_codes(codes[index], self.bits), **changed)

    def add_to(self, native: Any) -> None:
        native.add_code_term(
            self.bits,
            self.codes,
            self.scale_type,
            self.scales,
            self.group_size,
            self.levels,
            tensor_scale=self.tensor_scale,
            zero_points=self.zero_points,
            offset_type=self.offset_type or "fp16",
            offsets=self.offsets,
            selectors=self.selectors,
        )
