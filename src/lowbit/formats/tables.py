"""Level tables: what the codes of a weight format stand for, in code order.

Every table here is a tuple of finite floats; code c stands for table[c].
"""

from __future__ import annotations

# The quantiles of a normal distribution that QLoRA uses, zero included (arXiv:2305.14314, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# BitMoD (arXiv:2411.11745): the minus zero of FP3 or FP4 becomes one of four special values, chosen
# per group. FP3 is 0, 1, 2, 4 with a sign; FP4 is e2m1 doubled so that all levels are integers.
_BITMOD_MAGNITUDES = {3: (1.0, 2.0, 4.0), 4: (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)}
_BITMOD_SPECIAL = {3: (-6.0, -3.0, 3.0, 6.0), 4: (-16.0, -10.0, 10.0, 16.0)}

TERNARY = (-1.0, 0.0, 1.0)
BINARY = (-1.0, 1.0)
SWITCHES = (0.0, 1.0)


def symmetric_integers(bits: int) -> tuple[float, ...]:
    """Return -2**(bits-1) .. 2**(bits-1)-1; one bit gives -1, +1."""
    if bits == 1:
        return BINARY
    half = 2 ** (bits - 1)
    return tuple(float(v) for v in range(-half, half))


def unsigned_integers(bits: int) -> tuple[float, ...]:
    """Return 0 .. 2**bits-1, from which a zero-point is subtracted."""
    return tuple(float(v) for v in range(2**bits))


def bipolar_integers(bits: int) -> tuple[float, ...]:
    """Return the odd integers -(2**bits-1) .. 2**bits-1: symmetric around zero and without zero."""
    top = 2**bits - 1
    return tuple(float(v) for v in range(-top, top + 1, 2))


def sign_magnitude_integers(bits: int) -> tuple[float, ...]:
    """Return -(2**(bits-1)-1) .. 2**(bits-1)-1, the mantissas of block floating point; one code is unused."""
    top = 2 ** (bits - 1) - 1
    return tuple(float(v) for v in range(-top, top + 1))


def mx_integers() -> tuple[float, ...]:
    """Return -2 .. 2 - 1/64 in steps of 1/64, the elements of MXINT8 (OCP MX v1.0 section 5.3.4)."""
    return tuple(v / 64 for v in range(-128, 128))


def shift_levels(bits: int) -> tuple[float, ...]:
    """Return the signed powers of two +-1, +-2, +-4, ..: sign in the highest bit of the code, exponent below.

    Zero-free, as in DenseShift (arXiv:2208.09708): no code is lost to zero or minus zero.
    """
    magnitudes = [2.0**k for k in range(2 ** (bits - 1))]
    return tuple(magnitudes + [-v for v in magnitudes])


def bitmod_tables(bits: int) -> tuple[tuple[float, ...], ...]:
    """Return the four tables of BitMoD for 3 or 4 bits, ascending, one per special value."""
    magnitudes = _BITMOD_MAGNITUDES[bits]
    base = [-v for v in magnitudes] + [0.0] + list(magnitudes)
    return tuple(tuple(sorted([*base, special])) for special in _BITMOD_SPECIAL[bits])


def linear_step(table: tuple[float, ...]) -> float | None:
    """Return `step` if the levels are consecutive multiples of a step in code order, else None.

    Rounding to such levels is rounding to integers: level c is `table[0] + step * c`.
    """
    step = table[1] - table[0]
    if step <= 0 or not (table[0] / step).is_integer():
        return None
    if any(v != table[0] + step * c for c, v in enumerate(table)):
        return None
    return step
