// Rows of activations to integers, in two passes over a row that is in the first-level cache: whoever makes
// the row notes the largest magnitude of each group, then round_row() rounds. In two passes because the
// divisions of 16 groups cost as much as those of one.
#pragma once

#include "integer_row.h"
#include "matrix.h"
#include "simd/pack_bytes.h"

namespace lowbit::LOWBIT_ISA {

// x[i .. i + 16) with zeros from n on.
LOWBIT_INLINE F32 load_tail(const float* x, size_t i, size_t n) {
  if (i + 16 <= n) return load(x + i);
  return i < n ? load_n(x + i, n - i) : zero_f32();
}

// The largest magnitude of a group, and NaN if the row holds one or an infinity: max() drops a NaN, 0 * x
// keeps it.
struct Peak {
  F32 peak = zero_f32(), poison = zero_f32();
  LOWBIT_INLINE void see(F32 v) {
    peak = max(peak, abs(v));
    poison = fma(v, zero_f32(), poison);
  }
  // Ends a group; the poison goes on.
  LOWBIT_INLINE float close() {
    const float largest = reduce_max(peak);
    peak = zero_f32();
    return largest;
  }
};

// The integers of x[0 .. n), zeros up to row.padded; on entry row.scales has each group's largest magnitude.
// poison is 0, or NaN for a row whose scales shall all be NaN.
inline void round_row(const float* x, size_t n, const IntegerRow& row, F32 poison) {
  const size_t groups = (row.padded + kActivationGroup - 1) / kActivationGroup;
  const F32 top = set1(row.low ? static_cast<float>(kLimbMax) : 127.0f);
  const F32 spoiled = set1(reduce_add(poison));
  const U8 ones = set1_u8(1);
  int32_t sum = 0;
  int32_t* sums = row.sums;
  *sums++ = 0;
  alignas(64) float inverses[16];
  alignas(64) int32_t quads[16];
  for (size_t first = 0; first < groups; first += 16) {
    const size_t count = groups - first < 16 ? groups - first : 16;
    const F32 largest = add(load_tail(row.scales, first, groups), spoiled);
    // A group of zeros, or one so small that the reciprocal overflows, becomes zeros.
    store(inverses, select_gt(largest, set1(1e-30f), div(top, largest), zero_f32()));
    if (count == 16)
      store(row.scales + first, div(largest, top));
    else
      store_n(row.scales + first, div(largest, top), count);
    for (size_t g = 0; g < count; ++g) {
      const F32 inverse = set1(inverses[g]);
      const size_t begin = (first + g) * kActivationGroup;
      const size_t end = begin + kActivationGroup < row.padded ? begin + kActivationGroup : row.padded;
      const bool whole = end - begin == kActivationGroup;
      I32 fours = zero_i32();
      if (whole && end <= n && !row.low) {  // most groups
        I32 v[4];
        for (size_t i = 0; i < 4; ++i) v[i] = to_i32(round_even(mul(load(x + begin + 16 * i), inverse)));
        const I32 bytes = pack_bytes(v[0], v[1], v[2], v[3]);
        store_i32(reinterpret_cast<int32_t*>(row.high + begin), bytes);
        fours = dot4_small(zero_i32(), ones, bytes);
      } else {
        for (size_t i = begin; i < end; i += 16) {
          const F32 v = round_even(mul(load_tail(x, i, n), inverse));
          if (row.low) {
            const F32 h = floor(mul(add(v, set1(64.0f)), set1(1.0f / kLimbBase)));
            store_i8(row.high + i, to_i32(h));
            store_i8(row.low + i, to_i32(fma(h, set1(-static_cast<float>(kLimbBase)), v)));
          } else {
            store_i8(row.high + i, to_i32(v));
          }
        }
        if (whole) fours = dot4_small(zero_i32(), ones, load_s8(row.high + begin));
        if (whole && row.low)
          fours = add(shift_left<7>(fours), dot4_small(zero_i32(), ones, load_s8(row.low + begin)));
      }
      if (whole) {  // sums of 16 integers from sums of 4
        store_i32(quads, fours);
        for (size_t k = 0; k < 16; k += 4) {
          sum += quads[k] + quads[k + 1] + (quads[k + 2] + quads[k + 3]);
          *sums++ = sum;
        }
      } else {
        for (size_t i = begin; i < end; i += 16) {
          for (size_t k = i; k < i + 16; ++k)
            sum += row.low ? kLimbBase * row.high[k] + row.low[k] : row.high[k];
          *sums++ = sum;
        }
      }
    }
  }
}

}  // namespace lowbit::LOWBIT_ISA
