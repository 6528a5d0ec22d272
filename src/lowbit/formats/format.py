"""Format: what the stored numbers of a weight matrix mean.

A weight is  w = scale * table[code]            (a table of levels: integers, minifloats, codebooks, ..)
or           w = scale * (code - zero_point)    (asymmetric integers)
or a sum of several such terms, or a plain float. `group_size` inputs of a row share a scale; with m4 scales
they share a 4-bit multiplier, and up to 256 inputs a scale (multipliers.py).
A format of one's own is `Format.codebook(levels)`; everything downstream works from the fields alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lowbit.errors import FormatError
from lowbit.formats import tables
from lowbit.formats.minifloat import FLOAT_TYPES, minifloat
from lowbit.formats.multipliers import (
    MAX_MULTIPLIER,
    MAX_PRODUCT,
    MULTIPLIER_BITS,
    largest_integer_level,
    super_size,
)
from lowbit.formats.scales import SCALE_BITS, SCALE_TYPES

MODES = ("symmetric", "asymmetric", "bipolar")
MAX_TABLES = 4
CODED_BITS = 11.2  # of a coded bf16 weight of a language model: 8 of sign and mantissa, 3.2 of exponent
GROUP_MULTIPLE = 16  # the kernels keep sums of activations at this step
BASE3_GROUP_MULTIPLE = 64  # groups of codes stored in base 3 are whole groups of activations

# What formats of several terms are sums of: bits and tables.
STACKED = ((1, (tables.BINARY,)), (1, (tables.SWITCHES,)), (2, (tables.TERNARY,)))

# Published formats whose name fixes group and scale: name -> (element, group size, scale type).
PUBLISHED = {
    "mxfp4": ("e2m1", 32, "e8m0"),
    "mxfp6_e3m2": ("e3m2", 32, "e8m0"),
    "mxfp6_e2m3": ("e2m3", 32, "e8m0"),
    "mxfp8_e4m3": ("e4m3fn", 32, "e8m0"),
    "mxfp8_e5m2": ("e5m2", 32, "e8m0"),
    "nvfp4": ("e2m1", 16, "e4m3"),
}
_PUBLISHED_NAMES = {described: name for name, described in PUBLISHED.items()}
# Names that need no suffix at these values: base -> (group size, scale type).
_SHORT = {"ternary": (0, "fp16"), "mxint8": (32, "e8m0")}


@dataclass(frozen=True)
class Format:
    """A weight format. Build it with the constructors below or `parse_format`; fields are checked.

    name: canonical; `parse_format(f.name) == f` for everything but codebooks of the user
    bits: width of a code, 1 to 8; 16 or 32 for plain floats
    tables: the levels in code order, at most 2**bits of them, finite; up to 4 tables of equal length of which
        each group selects one; () for plain floats
    group_size: inputs that share a scale, a multiple of 16; 0: the whole row
    scale_type: "fp16", "fp32", "e8m0", "e4m3", "m4"; "none" for plain floats
    zero_point: True: w = scale * (code - zero_point), tables = ((0, 1, .., 2**bits - 1),)
    terms: number of stacked terms of this kind
    float_type: "fp16", "bf16" or "fp32" for plain floats, else None
    coded: True: bf16 whose exponents are entropy-coded, losslessly
    """

    name: str
    bits: int
    tables: tuple[tuple[float, ...], ...]
    group_size: int
    scale_type: str
    zero_point: bool = False
    terms: int = 1
    float_type: str | None = None
    coded: bool = False

    def __post_init__(self) -> None:
        what = f"format {self.name!r}"
        if self.float_type is not None:
            self._check_float(what)
            return
        if self.coded:
            raise FormatError(f"{what}: only bf16 is coded; use Format.lossless")
        if self.bits not in range(1, 9):
            raise FormatError(f"{what}: bits={self.bits}, must be 1 to 8")
        if self.scale_type not in SCALE_TYPES:
            raise FormatError(
                f"{what}: scale type {self.scale_type!r}, must be one of {', '.join(SCALE_TYPES)}"
            )
        if self.group_size < 0 or self.group_size % GROUP_MULTIPLE:
            raise FormatError(
                f"{what}: group_size={self.group_size}, must be a multiple of {GROUP_MULTIPLE},"
                " or 0 for one scale per row"
            )
        if self.terms not in range(1, 9):
            raise FormatError(f"{what}: terms={self.terms}, must be 1 to 8")
        if len(self.tables) not in range(1, MAX_TABLES + 1) or len({len(t) for t in self.tables}) != 1:
            raise FormatError(f"{what}: {len(self.tables)} tables, must be 1 to {MAX_TABLES} of equal length")
        if len(self.tables) > 1 and (self.bits > 4 or self.terms > 1 or self.zero_point):
            raise FormatError(f"{what}: several tables need at most 4 bits, one term and no zero-point")
        for table in self.tables:
            if len(table) > 2**self.bits:
                raise FormatError(
                    f"{what}: {len(table)} levels do not fit {self.bits} bits, the limit is {2**self.bits}"
                )
            if not all(math.isfinite(v) for v in table):
                raise FormatError(f"{what}: levels must be finite; leave infinities and NaN out")
            if len(set(table)) < 2:
                raise FormatError(f"{what}: needs at least 2 different levels")
        if self.zero_point and self.tables != (tables.unsigned_integers(self.bits),):
            raise FormatError(
                f"{what}: with a zero-point the levels are 0 to {2**self.bits - 1}; use Format.integer"
            )
        if self.terms > 1 and (self.bits, self.tables) not in STACKED:
            raise FormatError(
                f"{what}: {self.terms} terms need the levels -1, 1 or 0, 1 in 1 bit or -1, 0, 1 in 2 bits; "
                "use Format.binary_coded, Format.dual_binary or Format.trit_planes"
            )
        if self.scale_type == "m4":
            self._check_m4(what)

    def _check_m4(self, what: str) -> None:
        if self.zero_point or len(self.tables) > 1 or self.terms > 1:
            raise FormatError(
                f"{what}: m4 scales need one table, one term and no zero-point; use scale type fp16"
            )
        if not self.group_size:
            raise FormatError(f"{what}: m4 scales of whole rows; give a group size such as -g16, or use fp16")
        peak = largest_integer_level(self.tables)
        if peak * MAX_MULTIPLIER > MAX_PRODUCT:
            level = f"{peak:g} as an integer" if math.isfinite(peak) else "no integer"
            raise FormatError(
                f"{what}: its largest level is {level}, and m4 scales multiply integers of at most "
                f"{MAX_PRODUCT // MAX_MULTIPLIER}; use scale type fp16"
            )

    def _check_float(self, what: str) -> None:
        if self.float_type not in FLOAT_TYPES:
            raise FormatError(
                f"{what}: float type {self.float_type!r}, must be one of {', '.join(FLOAT_TYPES)}"
            )
        plain = ((), 0, "none", False, 1, FLOAT_TYPES[self.float_type].bits)
        if (self.tables, self.group_size, self.scale_type, self.zero_point, self.terms, self.bits) != plain:
            raise FormatError(f"{what}: a plain float has {plain[-1]} bits, no table, group, scale or terms")
        if self.coded and self.float_type != "bf16":
            raise FormatError(f"{what}: only bf16 is coded; use Format.lossless")

    @property
    def max_level(self) -> float:
        """Largest magnitude of a level of any table; 0.0 for plain floats."""
        return max((abs(v) for table in self.tables for v in table), default=0.0)

    def bits_per_weight(self, in_features: int) -> float:
        """Return the bits of codes, scales, zero-points and selectors per weight, without padding.

        `PackedMatrix.bits_per_weight` is the true number that a stored matrix takes; what coded weights take
        depends on them, and this is the usual number.
        """
        scale = SCALE_BITS[self.scale_type] / (self.scale_size(in_features) or in_features)
        of_group = 8 * self.zero_point + 8 * (len(self.tables) > 1)
        of_group += MULTIPLIER_BITS if self.scale_type == "m4" else 0
        return self.terms * (self.stored_bits + scale + of_group / (self.group_size or in_features))

    def scale_size(self, in_features: int) -> int:
        """Inputs that share a scale: the group, or with m4 scales the super-group; 0: the whole row."""
        if self.scale_type == "m4":
            return super_size(in_features, self.group_size)
        return self.group_size

    @property
    def packing(self) -> str:
        """How codes are stored: "base3", five ternary codes to a byte, or "planes" of bits."""
        ternary = self.bits == 2 and self.tables == (tables.TERNARY,)
        whole = self.group_size % BASE3_GROUP_MULTIPLE == 0 and self.scale_type != "m4"
        return "base3" if ternary and whole else "planes"

    @property
    def stored_bits(self) -> float:
        """Bits that a code takes in memory: 1.6 in base 3, about 11.2 for coded bf16, else `bits`."""
        if self.coded:
            return CODED_BITS
        return 1.6 if self.packing == "base3" else float(self.bits)

    @staticmethod
    def integer(bits: int, group_size: int = 64, mode: str = "symmetric", scale_type: str = "fp16") -> Format:
        """Integers of 1 to 8 bits.

        symmetric: -2**(bits-1) .. 2**(bits-1)-1 (one bit: -1, +1); asymmetric: 0 .. 2**bits-1 less a
        zero-point per group; bipolar: the odd integers -(2**bits-1) .. 2**bits-1.
        """
        if bits not in range(1, 9):
            raise FormatError(f"Format.integer: bits={bits}, must be 1 to 8")
        if mode not in MODES:
            raise FormatError(f"Format.integer: mode {mode!r}, must be one of {', '.join(MODES)}")
        if mode == "asymmetric":
            return _table_format(
                f"int{bits}a", bits, tables.unsigned_integers(bits), group_size, scale_type, True
            )
        if mode == "bipolar" and bits > 1:
            return _table_format(f"int{bits}b", bits, tables.bipolar_integers(bits), group_size, scale_type)
        return _table_format(f"int{bits}", bits, tables.symmetric_integers(bits), group_size, scale_type)

    @staticmethod
    def ternary(group_size: int = 0, scale_type: str = "fp16") -> Format:
        """Levels -1, 0, +1, stored in 1.6 bits, or in 2 with groups that are no multiple of 64.

        Source: BitNet b1.58, arXiv:2402.17764.
        """
        return _table_format("ternary", 2, tables.TERNARY, group_size, scale_type)

    @staticmethod
    def minifloat(
        exponent_bits: int,
        mantissa_bits: int,
        bias: int | None = None,
        specials: str | None = None,
        group_size: int = 64,
        scale_type: str | None = None,
    ) -> Format:
        """Floating-point levels of 3 to 8 bits; see `minifloat.Minifloat` for bias and special codes.

        Codes of infinities and NaN hold level 0.0 and are never chosen. scale_type None: fp16, or fp32 where
        the largest level is above 4096, since fp16 scales of usual weights would be subnormal there.
        """
        element = minifloat(exponent_bits, mantissa_bits, bias, specials)
        if element.bits > 8:
            raise FormatError(
                f"Format.minifloat: {element.name} has {element.bits} bits, at most 8; emulate() takes more"
            )
        usual = "fp32" if element.max > 4096 else "fp16"
        return _table_format(
            element.name, element.bits, element.levels(), group_size, scale_type or usual, usual_scale=usual
        )

    @staticmethod
    def codebook(
        levels: Iterable[float], group_size: int = 64, scale_type: str = "fp16", name: str | None = None
    ) -> Format:
        """Levels of the user's choice, 2 to 256 of them, finite, in code order.

        name: kept as it is; None: `codebook<number of levels>` with the group size.
        """
        table = tuple(float(v) for v in levels)
        if not 2 <= len(table) <= 256:
            raise FormatError(f"Format.codebook: {len(table)} levels, must be 2 to 256")
        if name is None:
            name = f"codebook{len(table)}" + _suffix(group_size, scale_type, "fp16")
        bits = max(1, (len(table) - 1).bit_length())
        return Format(name, bits, (table,), group_size, scale_type)

    @staticmethod
    def nf4(group_size: int = 64, scale_type: str = "fp16") -> Format:
        """The 16 NormalFloat levels of QLoRA, arXiv:2305.14314."""
        return _table_format("nf4", 4, tables.NF4, group_size, scale_type)

    @staticmethod
    def shift(bits: int, group_size: int = 64, scale_type: str = "fp16") -> Format:
        """Signed powers of two +-1, +-2, .., +-2**(2**(bits-1)-1); bits 2 to 5. See `tables.shift_levels`."""
        if bits not in range(2, 6):
            raise FormatError(
                f"Format.shift: bits={bits}, must be 2 to 5; more exponents reach below any weight"
            )
        return _table_format(f"shift{bits}", bits, tables.shift_levels(bits), group_size, scale_type)

    @staticmethod
    def bitmod(bits: int, group_size: int = 128, scale_type: str = "fp16") -> Format:
        """BitMoD of 3 or 4 bits: four tables, one chosen per group. Source: arXiv:2411.11745."""
        if bits not in (3, 4):
            raise FormatError(f"Format.bitmod: bits={bits}, must be 3 or 4")
        name = f"bitmod{bits}" + _suffix(group_size, scale_type, "fp16")
        return Format(name, bits, tables.bitmod_tables(bits), group_size, scale_type)

    @staticmethod
    def binary_coded(planes: int, group_size: int = 128, scale_type: str = "fp16") -> Format:
        """A sum of `planes` terms of levels -1, +1, each with its scales (ShiftAddLLM, arXiv:2406.05981)."""
        if planes not in range(1, 9):
            raise FormatError(f"Format.binary_coded: planes={planes}, must be 1 to 8")
        return _table_format(f"bcq{planes}", 1, tables.BINARY, group_size, scale_type, terms=planes)

    @staticmethod
    def trit_planes(planes: int, group_size: int = 128, scale_type: str = "fp16") -> Format:
        """A sum of `planes` ternary terms, each with its own scales (PTQTP, arXiv:2509.16989)."""
        if planes not in range(1, 5):
            raise FormatError(f"Format.trit_planes: planes={planes}, must be 1 to 4")
        return _table_format(f"trit{planes}", 2, tables.TERNARY, group_size, scale_type, terms=planes)

    @staticmethod
    def dual_binary(group_size: int = 64, scale_type: str = "fp16") -> Format:
        """A sum of two terms of levels 0, 1 with scales of either sign (DB-LLM, arXiv:2402.11960)."""
        if scale_type == "e8m0":
            raise FormatError("Format.dual_binary: e8m0 scales have no sign, and one is negative; use fp16")
        return _table_format("dual", 1, tables.SWITCHES, group_size, scale_type, terms=2)

    @staticmethod
    def block_floating_point(mantissa_bits: int, group_size: int = 32, scale_type: str = "e8m0") -> Format:
        """Signed mantissas of `mantissa_bits` (sign included, 2 to 8) that share a power of two."""
        if mantissa_bits not in range(2, 9):
            raise FormatError(f"Format.block_floating_point: mantissa_bits={mantissa_bits}, must be 2 to 8")
        levels = tables.sign_magnitude_integers(mantissa_bits)
        name = f"bfp{mantissa_bits}"
        return _table_format(name, mantissa_bits, levels, group_size, scale_type, usual_scale="e8m0")

    @staticmethod
    def mx_integer(group_size: int = 32, scale_type: str = "e8m0") -> Format:
        """MXINT8: two's complement in steps of 1/64 (OCP Microscaling Formats v1.0)."""
        return _table_format("mxint8", 8, tables.mx_integers(), group_size, scale_type, usual_scale="e8m0")

    @staticmethod
    def plain(float_type: str) -> Format:
        """Unquantized floats: "fp16", "bf16" or "fp32"."""
        if float_type not in FLOAT_TYPES:
            raise FormatError(f"Format.plain: {float_type!r}, must be one of {', '.join(FLOAT_TYPES)}")
        return Format(float_type, FLOAT_TYPES[float_type].bits, (), 0, "none", float_type=float_type)

    @staticmethod
    def lossless() -> Format:
        """bf16 with entropy-coded exponents. Source of the idea: DFloat11, arXiv:2504.11651."""
        return Format("df11", 16, (), 0, "none", float_type="bf16", coded=True)


def _suffix(group_size: int, scale_type: str, usual_scale: str) -> str:
    group = f"-g{group_size}" if group_size else "-row"
    return group if scale_type == usual_scale else f"{group}-{scale_type}"


def _table_format(
    base: str,
    bits: int,
    table: tuple[float, ...],
    group_size: int,
    scale_type: str,
    zero_point: bool = False,
    terms: int = 1,
    usual_scale: str = "fp16",
) -> Format:
    """Make a Format of one table under its canonical name; the usual scale type is left out of the name."""
    if (base, group_size, scale_type) in _PUBLISHED_NAMES:
        name = _PUBLISHED_NAMES[base, group_size, scale_type]
    elif _SHORT.get(base) == (group_size, scale_type):
        name = base
    else:
        name = base + _suffix(group_size, scale_type, usual_scale)
    return Format(name, bits, (table,), group_size, scale_type, zero_point, terms)
