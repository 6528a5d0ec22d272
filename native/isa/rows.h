// Loads and stores at the end of a row.
#pragma once

#include "simd/simd.h"

namespace lowbit::LOWBIT_ISA {

LOWBIT_INLINE F32 load_up_to(const float* p, size_t n) { return n >= 16 ? load(p) : load_n(p, n); }
LOWBIT_INLINE void store_up_to(float* p, F32 v, size_t n) {
  if (n >= 16)
    store(p, v);
  else
    store_n(p, v, n);
}

}  // namespace lowbit::LOWBIT_ISA
