// What the fits of GGUF blocks share: a block in each of 16 lanes, squared errors weighed.
#pragma once

#include <cstring>

#include "gguf_fit.h"
#include "simd/simd.h"

namespace lowbit::LOWBIT_ISA {

// w, g: [n of the type][16], weights and room for what their errors count.
void fit_q4_1(const float* w, float* g, size_t live, uint8_t* out);
void fit_q4_k(const float* w, float* g, size_t live, uint8_t* out);
void fit_q6_k(const float* w, float* g, size_t live, uint8_t* out);

namespace fit {

constexpr float kTiny = 0x1p-100f;  // smaller scales and squares count as none
constexpr int kRefits = 2, kRounds = 2;

LOWBIT_INLINE F32 at(const float* x, size_t i) { return load(x + 16 * i); }
LOWBIT_INLINE F32 limit(F32 v, float low, float high) { return min(max(v, set1(low)), set1(high)); }
LOWBIT_INLINE F32 inverse(F32 v) { return select_gt(abs(v), set1(kTiny), div(set1(1.0f), v), zero_f32()); }
LOWBIT_INLINE F32 halves(F32 v) {
  uint16_t stored[16];
  store_fp16(stored, limit(v, -65504.0f, 65504.0f));
  return load_fp16(stored);
}

// The fp16 number at `share` of `top` from which whole factors up to `most` reach top. Where fp16 is coarse,
// rounding down would fall short: then the next number.
LOWBIT_INLINE F32 unit_of(F32 top, float share, float most) {
  const F32 unit = halves(mul(top, set1(share)));
  const F32 missing = sub(abs(top), mul(abs(unit), set1(most + 1.0f)));
  const F32 step = select_gt(mul(top, set1(share)), zero_f32(), set1(0x1p-24f), set1(-0x1p-24f));
  return select_gt(missing, zero_f32(), add(unit, step), unit);
}

// g[n][16]: how many times the squared error of each weight counts.
inline void weigh(const float* w, size_t n, float* g) {
  F32 squares = zero_f32();
  for (size_t i = 0; i < n; ++i) squares = fma(at(w, i), at(w, i), squares);
  const F32 share = mul(inverse(mul(squares, set1(1.0f / static_cast<float>(n)))), set1(0.25f));
  for (size_t i = 0; i < n; ++i) store(g + 16 * i, fma(mul(at(w, i), at(w, i)), share, set1(0.75f)));
}

// Weights of one group and what their errors count.
struct Group {
  const float *w, *g;
  size_t n;
};

inline void put_half(uint8_t* out, float v) {
  uint16_t lanes[16];
  store_fp16(lanes, set1(v));
  std::memcpy(out, lanes, 2);
}

// Lane-wise numbers as an array.
struct Lanes {
  float v[16];
  explicit Lanes(F32 x) { store(v, x); }
};

}  // namespace fit

}  // namespace lowbit::LOWBIT_ISA
