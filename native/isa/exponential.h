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

}  // namespace lowbit::LOWBIT_ISA
