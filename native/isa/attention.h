// What attention over 16-bit and over 8-bit keys share: what a query sees, and how segments are folded.
#pragma once

#include "decoder_kernels.h"
#include "exponential.h"

namespace lowbit::LOWBIT_ISA {

constexpr float kHidden = -__builtin_inff();
// Rows and vectors of one register tile: 6 x 4 accumulators of AVX-512's 32 registers, 2 x 2 pairs of
// AVX2's 16.
constexpr size_t kRows = kGemmColumns;
constexpr size_t kWide = kGemmColumns > 2 ? 4 : 2;

// Of `size` keys from `first_key` on, those that a query at `position` sees: [first, last).
struct Span {
  size_t first, last;
};
LOWBIT_INLINE Span visible(size_t position, size_t window, size_t first_key, size_t size) {
  const size_t begin = window && position + 1 > window ? position + 1 - window : 0;
  const size_t end = position + 1;
  Span s;
  s.first = begin <= first_key ? 0 : begin - first_key < size ? begin - first_key : size;
  s.last = end <= first_key ? 0 : end - first_key < size ? end - first_key : size;
  return s;
}

// Folds peaks and sums of up to 16 rows of a segment into those of all earlier ones, peaks in units of `unit`
// (1, or ln 2); old and now [16] are what the earlier and the new sums of values must be multiplied by.
inline void fold_sums(size_t rows, const AttentionState& total, const AttentionState& part, float unit,
                      float* old, float* now) {
  for (size_t r = 0; r < 16; ++r) old[r] = now[r] = 0;
  for (size_t r = 0; r < rows; ++r) {
    const float next = total.peak[r] > part.peak[r] ? total.peak[r] : part.peak[r];
    const float base = next == kHidden ? 0.0f : next;  // rows that have seen no key: both weights are 0
    old[r] = total.peak[r] - base;
    now[r] = part.peak[r] - base;
    total.peak[r] = next;
  }
  store(old, exponential(mul(load(old), set1(unit))));
  store(now, exponential(mul(load(now), set1(unit))));
  for (size_t r = 0; r < rows; ++r) total.sum[r] = total.sum[r] * old[r] + part.sum[r] * now[r];
}
LOWBIT_INLINE F32 fold(F32 total, F32 part, float old, float now) {
  return fma(part, set1(now), mul(total, set1(old)));
}

}  // namespace lowbit::LOWBIT_ISA
