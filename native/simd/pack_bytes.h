// Four vectors of integers to bytes.
#pragma once

#include "simd/simd.h"

namespace lowbit::LOWBIT_ISA {

// The low bytes of a, then of b, c and d, all within -128 .. 127. Left in a register, since reading back four
// stores at once waits for them: rounding a row took 1.8 times as long.
#if defined(LOWBIT_ISA_avx512)
LOWBIT_INLINE I32 pack_bytes(I32 a, I32 b, I32 c, I32 d) {
  const __m512i ab = _mm512_packs_epi32(a.v, b.v), cd = _mm512_packs_epi32(c.v, d.v);
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return {_mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd))};
}
#else
LOWBIT_INLINE I32 pack_bytes(I32 a, I32 b, I32 c, I32 d) {
  alignas(64) int8_t bytes[64];
  store_i8(bytes, a), store_i8(bytes + 16, b), store_i8(bytes + 32, c), store_i8(bytes + 48, d);
  return load_s8(bytes);
}
#endif

}  // namespace lowbit::LOWBIT_ISA
