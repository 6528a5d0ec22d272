// exp() on 16 lanes, the same bits on every instruction set.
#pragma once

#include "simd/simd.h"

namespace lowbit::LOWBIT_ISA {

// exp(x) with a relative error below 2e-7. Exactly 1 at 0, 0 below -87.3 (the edge of normal floats),
// exp(88) above 88, NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) = 1 + r + r^2 Q(r), Q of degree 4 fitted to the smallest
// relative error (3e-9 before rounding).
LOWBIT_INLINE F32 exponential(F32 x) {
  const F32 lowest = set1(-87.3f);
  // The bound comes first: min and max give their second operand where one is NaN.
  const F32 c = max(lowest, min(set1(88.0f), x));
  const F32 n = round_even(mul(c, set1(0x1.715476p+0f)));                         // 1 / ln 2
  const F32 r = fma(n, set1(0x1.05c610p-29f), fma(n, set1(-0x1.62e430p-1f), c));  // ln 2 in two parts
  F32 q = fma(set1(0x1.6a23d0p-10f), r, set1(0x1.123a20p-7f));
  q = fma(q, r, set1(0x1.5558f2p-5f));
  q = fma(q, r, set1(0x1.555492p-3f));
  q = fma(q, r, set1(0x1.fffffcp-2f));
  const F32 p = add(fma(mul(r, r), q, r), set1(1.0f));
  return select_gt(lowest, x, zero_f32(), mul(p, from_bits(scale_exponent(to_i32(n)))));
}

// cap * tanh(x / cap), within 2e-7 of cap: 1 - 2 / (1 + exp(2 x / cap)). NaN for NaN.
LOWBIT_INLINE F32 soft_capped(F32 x, float cap) {
  const F32 e = exponential(mul(x, set1(2.0f / cap)));
  const F32 t = sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
  return mul(t, set1(cap));
}

// scale * 2^x for x <= 0, within 3e-6 of it; exactly `scale` at 0, 0 below -120, NaN for NaN. For weights
// that are rounded to 8 bits. x = n + r with |r| <= 1/2; 2^r = 1 + r P(r), P of degree 3.
LOWBIT_INLINE F32 power_of_two(F32 x, float scale) {
  const F32 lowest = set1(-120.0f);
  const F32 c = max(lowest, x);
  // Adding 1.5 * 2^23 leaves an integer in the low bits, here n plus the bias of an exponent.
  const F32 shift = set1(12582912.0f + 127.0f);
  const F32 shifted = add(c, shift);
  const F32 r = sub(c, sub(shifted, shift));
  F32 p = fma(set1(0x1.3a02ccp-7f * scale), r, set1(0x1.c9fc46p-5f * scale));
  p = fma(p, r, set1(0x1.ec0378p-3f * scale));
  p = fma(p, r, set1(0x1.62e12cp-1f * scale));
  p = fma(p, r, set1(scale));
  return select_gt(lowest, x, zero_f32(), mul(p, from_bits(shift_left<23>(bits(shifted)))));
}

}  // namespace lowbit::LOWBIT_ISA
