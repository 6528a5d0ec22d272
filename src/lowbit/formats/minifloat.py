"""Binary floating-point numbers with any exponent, mantissa and bias: code -> value and value -> code.

A code is `sign | exponent field | mantissa field`, sign highest. With field e, mantissa m and M mantissa bits
    e > 0:  (1 + m / 2**M) * 2**(e - bias)         e = 0:  (m / 2**M) * 2**(1 - bias)      (subnormals)
What the special codes mean is one of
    ieee    the highest exponent field holds infinity (m = 0) and NaN (m > 0)   e5m2, e4m3, e3m4, fp16
    fn      every bit but the sign set is NaN, no infinity                       e4m3fn
    fnuz    the code of minus zero is NaN, no infinity, no minus zero            e4m3fnuz, e5m2fnuz
    finite  every code is a number                                               e2m1, e3m2, e2m3
and e8m0, the scale of the MX formats, is unsigned: field e means 2**(e - 127), 255 is NaN, there is no zero.
Sources: IEEE 754-2019 section 3.4; arXiv:2209.05433 (e4m3fn, e5m2); arXiv:2206.02915 (fnuz);
OCP Microscaling Formats v1.0 section 5.3 (e2m1, e3m2, e2m3, e8m0).

Arithmetic is float64, so a float64 input is rounded once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats.rounding import round_to_integers

SPECIALS = ("ieee", "fn", "fnuz", "finite")
_NAME = re.compile(r"e(\d{1,2})m(\d{1,2})(?:b(-?\d{1,4}))?(ieee|fnuz|fn|finite)?")


def default_specials(exponent_bits: int, mantissa_bits: int) -> str:
    """Return the meaning of special codes of a bare name `e<E>m<M>`.

    Up to 6 bits, and where IEEE codes do not fit (no mantissa, or one exponent bit), all codes are numbers.
    """
    small = 1 + exponent_bits + mantissa_bits <= 6
    return "finite" if small or mantissa_bits < 1 or exponent_bits < 2 else "ieee"


@dataclass(frozen=True)
class Minifloat:
    """A floating-point format of `1 + exponent_bits + mantissa_bits` bits (no sign bit if not `signed`)."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str = "ieee"
    signed: bool = True

    def __post_init__(self) -> None:
        e, m = self.exponent_bits, self.mantissa_bits
        what = (
            f"minifloat(exponent_bits={e}, mantissa_bits={m}, bias={self.bias}, specials={self.specials!r})"
        )
        if self.specials == "fn" and self.signed and 1 + e + m <= 6:
            raise FormatError(
                f"{what}: formats of at most 6 bits spend no code on NaN (float4_e2m1fn and float6_e3m2fn are"
                " finite); use specials='finite' or leave it out"
            )
        if not (1 <= e <= 11 and 0 <= m <= 52):
            raise FormatError(
                f"{what}: exponent_bits must be 1 to 11 and mantissa_bits 0 to 52, as in float64"
            )
        if self.specials not in SPECIALS:
            raise FormatError(f"{what}: specials must be one of {', '.join(SPECIALS)}")
        if self.specials == "ieee" and (e < 2 or m < 1):
            raise FormatError(f"{what}: ieee needs 2 exponent bits and 1 mantissa bit; use specials='finite'")
        if not self.signed and (m != 0 or self.specials != "fn"):
            raise FormatError(f"{what}: an unsigned minifloat is a scale with mantissa_bits=0, specials='fn'")
        if e + m < 2:
            raise FormatError(f"{what}: needs at least 3 bits; use Format.ternary() or Format.integer()")
        if self.smallest_exponent - m < -1074 or self.largest_exponent > 1023:
            raise FormatError(
                f"{what}: values fall outside of float64; choose a bias nearer to {2 ** (e - 1) - 1}"
            )

    @property
    def bits(self) -> int:
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def name(self) -> str:
        """Canonical name; `parse_minifloat(self.name) == self`."""
        e, m = self.exponent_bits, self.mantissa_bits
        if not self.signed:
            return f"e{e}m{m}"
        text = f"e{e}m{m}"
        if self.bias != _default_bias(e, self.specials):
            text += f"b{self.bias}"
        return text if self.specials == default_specials(e, m) else text + self.specials

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal number, which the subnormal numbers share."""
        return 1 - self.bias if self.signed else -self.bias

    @property
    def largest_exponent(self) -> int:
        field = 2**self.exponent_bits - 1
        if self.specials == "ieee" or (self.specials == "fn" and self.mantissa_bits == 0):
            field -= 1
        return field - self.bias

    @property
    def max(self) -> float:
        """Largest finite value."""
        steps = 2**self.mantissa_bits - 1
        if self.specials == "fn" and self.mantissa_bits > 0:
            steps -= 1
        return float(np.ldexp(1.0 + steps / 2**self.mantissa_bits, self.largest_exponent))

    @property
    def smallest_normal(self) -> float:
        return float(np.ldexp(1.0, self.smallest_exponent))

    @property
    def smallest_subnormal(self) -> float:
        return float(np.ldexp(1.0, self.smallest_exponent - self.mantissa_bits))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return the float64 value of every code, infinities and NaN included.

        codes: unsigned integers of any shape, below 2**bits.
        """
        codes = np.asarray(codes)
        if codes.dtype.kind not in "iu" or (
            codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < 2**self.bits
        ):
            raise FormatError(f"decode({self.name}): codes must be integers from 0 to {2**self.bits - 1}")
        codes = codes.astype(np.uint64)
        m = self.mantissa_bits
        magnitude = codes & np.uint64(2 ** (self.exponent_bits + m) - 1)
        field = (magnitude >> np.uint64(m)).astype(np.int64)
        mantissa = (magnitude & np.uint64(2**m - 1)).astype(np.float64)
        if not self.signed:
            value = np.ldexp(1.0, field - self.bias)
            return np.where(field == 2**self.exponent_bits - 1, np.nan, value)
        normal = field > 0
        top = np.where(normal, mantissa + 2.0**m, mantissa)
        with np.errstate(over="ignore"):  # the exponent field that holds infinity may exceed float64
            value = np.ldexp(top, np.maximum(field, 1) - self.bias - m)
        negative = codes >> np.uint64(self.bits - 1) != 0
        last = field == 2**self.exponent_bits - 1
        if self.specials == "ieee":
            value = np.where(last, np.where(mantissa == 0, np.inf, np.nan), value)
        elif self.specials == "fn":
            value = np.where(last & (mantissa == 2**m - 1), np.nan, value)
        value = np.where(negative, -value, value)
        if self.specials == "fnuz":
            value = np.where(negative & (magnitude == 0), np.nan, value)
        return value

    def values(self) -> np.ndarray:
        """Return float64 [2**bits], the value of every code; for formats of at most 16 bits."""
        if self.bits > 16:
            raise FormatError(f"values({self.name}): {self.bits} bits are too many to list, the limit is 16")
        return self.decode(np.arange(2**self.bits, dtype=np.uint32))

    def levels(self) -> tuple[float, ...]:
        """Return the table used for weights: value by code, 0.0 at the codes of infinity, NaN and minus zero.

        A quantizer takes the lowest code of equal levels, so the codes of infinity and NaN never occur.
        """
        values = self.values()
        return tuple(float(v) if np.isfinite(v) and v != 0 else 0.0 for v in values)

    def round(
        self,
        x: np.ndarray,
        rounding: str = "nearest_even",
        rng: np.random.Generator | None = None,
        saturate: bool = False,
    ) -> np.ndarray:
        """Round to the nearest representable values in the sense of `rounding`; float64 in, float64 out.

        Numbers are rounded as if the exponent had no upper limit. A result above `max` then becomes infinity
        (ieee), NaN (fn, fnuz) or `max` (finite, or `saturate`); rounding toward the finite side stops at
        `max`, as IEEE 754 section 7.4 has it. Infinities overflow in every rounding mode. NaN stays NaN.
        An unsigned format has neither zero nor sign: zero and negative numbers become NaN, smaller numbers
        than its smallest become that.
        """
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes quiet
            x = np.asarray(x, dtype=np.float64)
        m, smallest = self.mantissa_bits, self.smallest_exponent
        finite = np.isfinite(x)
        safe = np.where(finite, x, 0.0)
        exponent = np.frexp(safe)[1] - 1  # 2**exponent <= |x| < 2**(exponent + 1)
        quantum = np.maximum(exponent, smallest) - m
        # Scaling in two steps keeps the factor inside float64 where quantum is near the ends of its range.
        steps = np.ldexp(np.ldexp(safe, -(quantum // 2)), -(quantum - quantum // 2))
        rounded = round_to_integers(steps, rounding, rng)
        with np.errstate(over="ignore"):
            result = np.ldexp(rounded, quantum)
        over = finite & (np.abs(result) > self.max)
        inward = (
            (rounding == "toward_zero") | ((rounding == "up") & (x < 0)) | ((rounding == "down") & (x > 0))
        )
        limit = np.copysign(self.max, x)
        if self.specials == "finite" or saturate:
            result = np.where(over | np.isinf(x), limit, result)
        else:
            beyond = np.copysign(np.inf, x) if self.specials == "ieee" else np.nan
            result = np.where(over, np.where(inward, limit, beyond), result)
            result = np.where(np.isinf(x), beyond, result)
        if self.specials == "fnuz":
            result = result + 0.0  # minus zero becomes zero
        if not self.signed:
            result = np.where(
                (x > 0) & ~(result > self.smallest_normal) & ~np.isnan(result), self.smallest_normal, result
            )
            result = np.where(x > 0, result, np.nan)
        return np.where(np.isnan(x), x, result)

    def encode(
        self,
        x: np.ndarray,
        rounding: str = "nearest_even",
        rng: np.random.Generator | None = None,
        saturate: bool = False,
    ) -> np.ndarray:
        """Return the codes of `x` rounded as by `round`: uint8, uint16, uint32 or uint64 of x's shape.

        NaN takes the code that ml_dtypes gives it (sign kept where the format has signed NaN codes).
        Raises FormatError for NaN where the format has no NaN.
        """
        value = self.round(x, rounding, rng, saturate)
        e, m = self.exponent_bits, self.mantissa_bits
        nan = np.isnan(value)
        if self.specials == "finite" and nan.any():
            raise FormatError(
                f"encode({self.name}): the input holds NaN, which {self.name} cannot represent; remove it"
            )
        infinite = np.isinf(value)
        magnitude = np.where(nan | infinite, 0.0, np.abs(value))
        exponent = np.maximum(np.frexp(magnitude)[1] - 1, self.smallest_exponent)
        exponent = np.where(magnitude == 0, self.smallest_exponent, exponent)  # frexp(0) is 0
        half = (m - exponent) // 2
        steps = np.ldexp(np.ldexp(magnitude, half), m - exponent - half).astype(np.uint64)
        # steps holds the hidden bit: a normal number of field f adds (f - 1) << m to it, a subnormal 0.
        codes = steps + ((exponent - self.smallest_exponent).astype(np.uint64) << np.uint64(m))
        if not self.signed:
            codes = codes - np.uint64(1)
            codes = np.where(nan, np.uint64(2**e - 1), codes)
        else:
            negative = np.signbit(value)
            if self.specials == "ieee":
                top = np.uint64((2**e - 1) << m)
                codes = np.where(infinite, top, np.where(nan, top | np.uint64(2 ** (m - 1)), codes))
            elif self.specials == "fn":
                codes = np.where(nan, np.uint64(2 ** (e + m) - 1), codes)
                negative = np.where(nan, np.signbit(x), negative)
            codes = codes | (negative.astype(np.uint64) << np.uint64(e + m))
            if self.specials == "fnuz":
                codes = np.where(nan, np.uint64(1) << np.uint64(e + m), codes)
        for dtype in (np.uint8, np.uint16, np.uint32):
            if self.bits <= np.iinfo(dtype).bits:
                return codes.astype(dtype)
        return codes


def _default_bias(exponent_bits: int, specials: str) -> int:
    return 2 ** (exponent_bits - 1) - (0 if specials == "fnuz" else 1)


def minifloat(
    exponent_bits: int, mantissa_bits: int, bias: int | None = None, specials: str | None = None
) -> Minifloat:
    """Make a signed Minifloat; a missing bias or meaning of special codes is that of the bare name."""
    if specials is None:
        specials = default_specials(exponent_bits, mantissa_bits)
    if bias is None:
        bias = _default_bias(exponent_bits, specials)
    return Minifloat(exponent_bits, mantissa_bits, bias, specials)


E8M0 = Minifloat(8, 0, 127, "fn", signed=False)
FLOAT_TYPES = {"fp16": minifloat(5, 10), "bf16": minifloat(8, 7), "fp32": minifloat(8, 23)}


def parse_minifloat(name: str) -> Minifloat | None:
    """Return the Minifloat called `name` (`e4m3fn`, `e3m2`, `e4m3b11fnuz`, `fp16`), or None if there is none.

    `e8m0` is the unsigned scale. `e2m1fn`, `e3m2fn` and `e2m3fn` are accepted for what they are in
    ml_dtypes: `e2m1`, `e3m2` and `e2m3`. Raises FormatError for a well-formed name of an impossible format.
    """
    if name in FLOAT_TYPES:
        return FLOAT_TYPES[name]
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    e, m, bias, specials = match.groups()
    if (e, m, bias, specials) == ("8", "0", None, None):
        return E8M0
    if specials == "fn" and 1 + int(e) + int(m) <= 6:
        specials = None
    if int(e) < 1:
        raise FormatError(
            f"{name}: a minifloat needs 1 to 11 exponent bits; for integers write int{int(m) + 1}"
        )
    return minifloat(int(e), int(m), None if bias is None else int(bias), specials)
