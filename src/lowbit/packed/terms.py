"""Codes, levels and scales, with the checks that make them safe to multiply with.

A code term is  w[o, i] = tensor_scale * scales[o, i / g] * (levels[codes[o, i]] - zero_points[o, i / g])
+ offsets[o, i / g],  or with m4 scales  tensor_scale * scales[o, i / s] * (multipliers[o, i / g] *
levels[codes[o, i]]). With m8 scales, scales[o, i / g] is an fp16 number of a super-group times an int8 factor
of the group, and offsets[o, i / g] likewise.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats.multipliers import (
    MAX_MULTIPLIER,
    MAX_PRODUCT,
    SUPER_MULTIPLE,
    largest_integer_level,
)
from lowbit.packed.base3 import base3_shape, pack_base3, unpack_base3
from lowbit.packed.layout import (
    BLOCK_ROWS,
    PLANES,
    TILE_ROWS,
    block_count,
    check_group_size,
    codes_shape,
    group_count,
    pack_codes,
    pack_multipliers,
    unpack_codes,
    unpack_groups,
    unpack_multipliers,
)
from lowbit.packed.term import check_array, integer, take_groups

SCALE_DTYPES = {
    "fp16": np.float16,
    "fp32": np.float32,
    "e8m0": np.uint8,
    "e4m3": np.uint8,
    "m4": np.float16,
    "m8": np.float16,
}
PACKINGS = ("planes", "base3")
OFFSET_DTYPES = {"fp16": np.float16, "fp32": np.float32}
MAX_TABLES = 4
_OPTIONAL = ("factors", "offset_factors", "multipliers", "offsets", "zero_points", "selectors")


@dataclass(frozen=True, eq=False)
class CodeTerm:
    """One term of codes, levels and scales.

    bits: width of a code, 1..8
    levels: float32 [tables, n], n <= 2**bits, in code order; up to 4 tables of at most 16 levels
    codes: uint8 [blocks, chunks, 2, 64 * bits], or with packing "base3" [blocks, vectors, 2, 64]
    scales: float16 | float32 | uint8 (e8m0, e4m3) [blocks, groups, 32]; padded rows hold 0
    scale_type: "fp16" | "fp32" | "e8m0" | "e4m3" | "m4" (float16 scales of super-groups, and multipliers of
        levels) | "m8" (float16 scales of super-groups, and factors of scales)
    group_size: inputs that share a scale (m4: a multiplier), a multiple of 16; 0: the whole row
    zero_points: uint8 [blocks, groups, 32] in code units, or None
    offsets: float16 | float32 [blocks, groups, 32], or None
    selectors: uint8 [blocks, groups, 32], which table a group uses, or None with one table
    tensor_scale: multiplies every scale
    tensor_divisor: divides every scale after that (NVFP4 as compressed-tensors stores it)
    packing: "planes" (layout.py) or "base3" (base3.py: bits=2, three levels, groups of 64 n or the row)
    multipliers: m4 only: uint8 [blocks, groups, 16], 0 .. 15 each, two to a byte; padded rows hold 0
    super_size: m4 and m8 only: inputs that share a scale, a multiple of group_size (m4: and of 64); 0: the
        whole row
    factors: m8 only: int8 [blocks, groups, 32]; a group's scale is scale * factor
    offset_factors: m8 with offsets: int8 [blocks, groups, 32]; offsets are float16 of super-groups
    """

    kind: ClassVar[str] = "codes"
    quantized: ClassVar[bool] = True
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
    packing: str = "planes"
    multipliers: np.ndarray | None = None
    super_size: int = 0
    tensor_divisor: float = 1.0
    factors: np.ndarray | None = None
    offset_factors: np.ndarray | None = None

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """The stored arrays by name, large ones first."""
        for name in ("codes", "scales", *_OPTIONAL, "levels"):
            array = getattr(self, name)
            if array is not None:
                yield name, array

    def numbers(self) -> Iterator[tuple[str, str, np.ndarray]]:
        yield "scales", "fp16" if self.scale_type in ("m4", "m8") else self.scale_type, self.scales
        if self.offsets is not None:
            yield "offsets", self.offset_type or "fp16", self.offsets

    def meta(self) -> dict[str, Any]:
        names = ("bits", "scale_type", "group_size", "tensor_scale")
        meta = {name: getattr(self, name) for name in names}
        if self.packing != "planes":
            meta["packing"] = self.packing
        if self.multipliers is not None or self.factors is not None:
            meta["super_size"] = self.super_size
        if self.tensor_divisor != 1.0:
            meta["tensor_divisor"] = self.tensor_divisor
        return meta

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> "CodeTerm":
        optional = {name: arrays.pop(name, None) for name in _OPTIONAL}
        return cls(
            bits=integer(meta["bits"]),
            levels=arrays.pop("levels"),
            codes=arrays.pop("codes"),
            scales=arrays.pop("scales"),
            scale_type=meta["scale_type"],
            group_size=integer(meta["group_size"]),
            tensor_scale=float(meta["tensor_scale"]),
            packing=meta.get("packing", "planes"),
            super_size=integer(meta.get("super_size", 0)),
            tensor_divisor=float(meta.get("tensor_divisor", 1.0)),
            **optional,
        )

    @property
    def offset_type(self) -> str | None:
        if self.offsets is None:
            return None
        return "fp16" if self.offsets.dtype == np.float16 else "fp32"

    @property
    def scale_size(self) -> int:
        """Inputs that share a scale, 0 for the whole row: `group_size`, or with m4 scales `super_size`."""
        return self.group_size if self.multipliers is None else self.super_size

    def unpack(self, out_features: int, in_features: int) -> np.ndarray:
        """The codes, uint8 [out_features, in_features]."""
        if self.packing == "base3":
            return unpack_base3(self.codes, out_features, in_features)
        return unpack_codes(self.codes, out_features, in_features, self.bits)

    def repack(self, codes: np.ndarray) -> np.ndarray:
        """The array `codes` that holds these codes, uint8 [out_features, in_features]."""
        return pack_base3(codes) if self.packing == "base3" else pack_codes(codes, self.bits)

    def check(self, out_features: int, in_features: int) -> None:
        """Raise FormatError unless every array has the dtype and shape of this matrix."""
        if self.bits not in PLANES:
            raise FormatError(f"code term: bits={self.bits}, but stored codes have 1 to 8 bits")
        if self.scale_type not in SCALE_DTYPES:
            raise FormatError(
                f"code term: scale type {self.scale_type!r}; use one of {', '.join(SCALE_DTYPES)}"
            )
        check_group_size(in_features, self.group_size, "code term")
        self._check_levels()
        self._check_packing()
        self._check_factors(in_features)
        self._check_multipliers(out_features, in_features)
        groups = (block_count(out_features), group_count(in_features, self.scale_size), BLOCK_ROWS)
        supers = groups
        if self.factors is not None:
            supers = (groups[0], group_count(in_features, self.super_size), BLOCK_ROWS)
        shape = codes_shape(out_features, in_features, self.bits)
        if self.packing == "base3":
            shape = base3_shape(out_features, in_features)
        check_array("codes", self.codes, (np.uint8,), shape)
        check_array("scales", self.scales, (SCALE_DTYPES[self.scale_type],), supers)
        for name, dtypes, of in (
            ("zero_points", (np.uint8,), groups),
            ("offsets", (np.float16, np.float32), supers),
            ("selectors", (np.uint8,), groups),
            ("factors", (np.int8,), groups),
            ("offset_factors", (np.int8,), groups),
        ):
            array = getattr(self, name)
            if array is not None:
                check_array(name, array, dtypes, of)
        if self.selectors is not None and int(self.selectors.max(initial=0)) >= self.levels.shape[0]:
            raise FormatError(
                f"code term: selector {int(self.selectors.max())} with {self.levels.shape[0]} tables; "
                "selectors count from 0"
            )
        if not np.isfinite(self.tensor_scale):
            raise FormatError(f"code term: tensor_scale={self.tensor_scale}; it must be finite")
        if not (np.isfinite(self.tensor_divisor) and np.float32(self.tensor_divisor) != 0):
            raise FormatError(f"code term: tensor_divisor={self.tensor_divisor}; it must be finite and not 0")

    def _check_packing(self) -> None:
        if self.packing not in PACKINGS:
            raise FormatError(f"code term: packing {self.packing!r}; use one of {', '.join(PACKINGS)}")
        if self.packing == "planes":
            return
        if self.bits != 2 or self.levels.shape[0] != 1 or self.levels.shape[1] > 3:
            raise FormatError(
                f"code term: base3 packing with bits={self.bits} and levels {list(self.levels.shape)}; "
                "it holds codes 0, 1, 2: bits=2 and at most three levels"
            )
        if self.group_size % 64:
            raise FormatError(
                f"code term: base3 packing with group_size={self.group_size}; "
                "use the whole row (0) or a multiple of 64"
            )
        for name in ("zero_points", "offsets", "multipliers"):
            if getattr(self, name) is not None:
                raise FormatError(f"code term: base3 packing with {name}; leave them out, or pack in planes")

    def _check_factors(self, in_features: int) -> None:
        if (self.scale_type == "m8") != (self.factors is not None):
            raise FormatError(
                f"code term: scale type {self.scale_type!r} and factors "
                f"{'absent' if self.factors is None else 'present'}; m8 scales have them, others none"
            )
        wanted = self.factors is not None and self.offsets is not None
        if wanted != (self.offset_factors is not None) or (wanted and self.offset_type != "fp16"):
            raise FormatError(
                "code term: offset factors go with m8 scales and float16 offsets, and these with them"
            )
        if self.factors is None:
            return
        size = self.super_size
        if not self.group_size or size < 0 or size % self.group_size or (size and in_features % size):
            raise FormatError(
                f"code term: m8 scales with super_size={size}, group_size={self.group_size} and in_features="
                f"{in_features}; groups are no whole rows, and super_size is a multiple of them that divides "
                "in_features, or 0 for the whole row"
            )

    def _check_multipliers(self, out_features: int, in_features: int) -> None:
        if (self.scale_type == "m4") != (self.multipliers is not None):
            raise FormatError(
                f"code term: scale type {self.scale_type!r} and multipliers "
                f"{'absent' if self.multipliers is None else 'present'}; m4 scales have them, others none"
            )
        if self.multipliers is None:
            if self.super_size and self.factors is None:
                raise FormatError(
                    f"code term: super_size={self.super_size} with {self.scale_type} scales; only m4 and m8 "
                    "have it"
                )
            return
        for name in ("zero_points", "offsets", "selectors"):
            if getattr(self, name) is not None:
                raise FormatError(f"code term: m4 scales with {name}; leave them out, or use fp16 scales")
        if not self.group_size:
            raise FormatError("code term: m4 scales of whole rows; give a group_size, or use fp16 scales")
        size = self.super_size
        if size < 0 or size % self.group_size or size % SUPER_MULTIPLE or (size and in_features % size):
            raise FormatError(
                f"code term: super_size={size} with group_size={self.group_size} and in_features="
                f"{in_features}; it must be a multiple of group_size and {SUPER_MULTIPLE} that divides "
                "in_features, or 0 for the whole row"
            )
        groups = group_count(in_features, self.group_size)
        shape = (block_count(out_features), groups, TILE_ROWS)
        check_array("multipliers", self.multipliers, (np.uint8,), shape)
        peak = largest_integer_level(self.levels.tolist())
        if peak * MAX_MULTIPLIER > MAX_PRODUCT:
            raise FormatError(
                f"code term: m4 scales with an integer level of {peak:g}; times {MAX_MULTIPLIER} it must be "
                f"at most {MAX_PRODUCT}"
            )

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

    def dequantize(self, out_features: int, in_features: int) -> np.ndarray:
        """float32 [out_features, in_features]: (scale * tensor_scale / tensor_divisor) * (level - zero_point)
        + offset, or (scale * tensor_scale / tensor_divisor) * (multiplier * level).
        """
        codes = self.unpack(out_features, in_features)
        if codes.size and int(codes.max()) >= self.levels.shape[1]:
            raise FormatError(
                f"dequantize: code {int(codes.max())}, but the table has {self.levels.shape[1]} levels; "
                "the codes are damaged"
            )
        groups = group_count(in_features, self.scale_size)
        grouped = codes.reshape(out_features, groups, -1)
        if self.selectors is None:
            values = self.levels[0][grouped]
        else:
            values = self.levels[unpack_groups(self.selectors, out_features)[:, :, None], grouped]
        if self.zero_points is not None:
            values -= unpack_groups(self.zero_points, out_features)[:, :, None].astype(np.float32)
        if self.multipliers is not None:
            factors = unpack_multipliers(self.multipliers, out_features).astype(np.float32)
            values *= np.repeat(factors, self.group_size, axis=1).reshape(values.shape)
        values *= self.effective_scales(out_features)[:, :, None]
        if self.offsets is not None:
            values += self.effective_offsets(out_features)[:, :, None]
        return values.reshape(out_features, in_features)

    def effective_scales(self, out_features: int) -> np.ndarray:
        """scale * tensor_scale / tensor_divisor, float32 [out_features, groups of `scale_size`]; with m8 the
        scale is scale * factor."""
        from lowbit.formats.scales import decode_scales  # not needed to run: a megabyte

        stored = unpack_groups(self.scales, out_features)
        if self.factors is not None:
            scales = _times(stored, unpack_groups(self.factors, out_features))
        else:
            scales = decode_scales(stored, self.scale_type).astype(np.float32, copy=False)
        scales = scales * np.float32(self.tensor_scale)
        return scales if self.tensor_divisor == 1.0 else scales / np.float32(self.tensor_divisor)

    def effective_offsets(self, out_features: int) -> np.ndarray:
        """offset of each group, float32 [out_features, groups]; the term has offsets."""
        assert self.offsets is not None
        stored = unpack_groups(self.offsets, out_features)
        if self.offset_factors is not None:
            return _times(stored, unpack_groups(self.offset_factors, out_features))
        return stored.astype(np.float32)

    def take_rows(self, index: np.ndarray, out_features: int, in_features: int) -> "CodeTerm":
        changed = {"codes": self.repack(self.unpack(out_features, in_features)[index])}
        if self.multipliers is not None:
            multipliers = unpack_multipliers(self.multipliers, out_features)
            changed["multipliers"] = pack_multipliers(multipliers[index])
        for name, array in self.arrays():
            if name != "levels" and name not in changed:
                changed[name] = take_groups(array, index, out_features)
        return replace(self, **changed)  # type: ignore[arg-type]

    def add_to(self, native: Any) -> None:
        # Base-3 codes and multipliers go by names of their own, so that plain terms run on older native code.
        further: dict[str, Any] = {}
        if self.packing != "planes":
            further["packing"] = self.packing
        if self.multipliers is not None:
            further |= {"multipliers": self.multipliers, "multiplier_size": self.group_size}
        if self.factors is not None:
            further |= {"factors": self.factors, "super_size": self.super_size}
        if self.offset_factors is not None:
            further["offset_factors"] = self.offset_factors
        try:
            native.add_code_term(
                self.bits,
                self.codes,
                "fp16" if self.scale_type in ("m4", "m8") else self.scale_type,
                self.scales,
                self.scale_size,
                self.levels,
                tensor_scale=self.tensor_scale / self.tensor_divisor,
                zero_points=self.zero_points,
                offset_type=self.offset_type or "fp16",
                offsets=self.offsets,
                selectors=self.selectors,
                **further,
            )
        except TypeError as error:
            if not further:
                raise
            raise UnsupportedError(
                f"matmul: the native code of this build has no products with {' and '.join(further)}; "
                "build it again (make build)"
            ) from error


def _times(scales: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """float16 [rows, super-groups] times int8 [rows, groups]: float32 [rows, groups], exactly."""
    wide = np.repeat(scales.astype(np.float32), factors.shape[1] // scales.shape[1], axis=1)
    with np.errstate(invalid="ignore"):  # damaged scales; whoever uses the weights checks
        return wide * factors.astype(np.float32)
