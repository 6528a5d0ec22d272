// Attention of a tile of queries over one block of 64 keys, with softmax in progress.
//
// Hidden keys count as weight 0 in the same trees, and a block that a query may not see leaves its state as
// it is, so the arithmetic of a query (the order of every sum, which values a peak is taken over) depends on
// its position only.
//
// Work is done in groups of kRows rows, all accumulators in registers:
//   scores  [rows][64 keys]  += query[d] (broadcast) * key[d][16 keys]     for d in order
//   mixed   [rows][head_dim] += weight[key] (broadcast) * value[key][16]   for key in order
#pragma once

#include "attention.h"
#include "kv_cache.h"

namespace lowbit::LOWBIT_ISA {
namespace {

// The block that comes next, fetched while the present one is computed: without it a long context is read at
// a fifth of the memory's rate, since each head's keys are only read in short stretches.
template <typename Number>
LOWBIT_INLINE void fetch(const Number* next, size_t offset) {
  if (sizeof(Number) == sizeof(uint16_t)) {  // widened blocks are in the cache already
    __builtin_prefetch(next + offset);
    __builtin_prefetch(next + offset + 32);  // the second cache line of 64 numbers
  }
}

constexpr size_t kVectors = kAttentionBlock / 16;
static_assert(kSegment % kAttentionBlock == 0 && kAttentionBlock % kKeyLanes == 0, "blocks tile segments");

LOWBIT_INLINE F32 load_number(const float* p) { return load(p); }
LOWBIT_INLINE F32 load_number(const uint16_t* p) { return load_fp16(p); }

// scores[row * 64 + 16 v + lane] of `vectors` key vectors, each [head_dim][16] and `key_step` numbers apart.
template <size_t rows, size_t vectors, typename Number>
__attribute__((noinline)) void score(const float* queries, size_t query_stride, const Number* keys,
                                     const Number* next, size_t key_step, size_t head_dim, float* scores) {
  F32 acc[rows][vectors];
#pragma GCC unroll 8
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; ++v) acc[r][v] = zero_f32();
  for (size_t d = 0; d < head_dim; ++d) {
    F32 key[vectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; ++v) key[v] = load_number(keys + v * key_step + d * kKeyLanes);
    fetch(next, d * kAttentionBlock);
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; ++r) {
      const F32 q = set1(queries[r * query_stride + d]);
#pragma GCC unroll 4
      for (size_t v = 0; v < vectors; ++v) acc[r][v] = fma(q, key[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; ++v) store(scores + r * kAttentionBlock + 16 * v, acc[r][v]);
}

// mixed[row][16 v ..] = mixed * fade[row] + sum over keys in [first, last) of weights[row * 64 + key] *
// value.
template <size_t rows, size_t vectors, typename Number>
__attribute__((noinline)) void mix(const float* weights, const float* fade, const Number* values,
                                   const Number* next, size_t stride, size_t first, size_t last,
                                   float* mixed) {
  F32 acc[rows][vectors];
#pragma GCC unroll 8
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; ++v) acc[r][v] = mul(load(mixed + r * stride + 16 * v), set1(fade[r]));
  for (size_t key = first; key < last; ++key) {
    F32 value[vectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; ++v) value[v] = load_number(values + key * stride + 16 * v);
    fetch(next, key * stride);
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; ++r) {
      const F32 w = set1(weights[r * kAttentionBlock + key]);
#pragma GCC unroll 4
      for (size_t v = 0; v < vectors; ++v) acc[r][v] = fma(w, value[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; ++v) store(mixed + r * stride + 16 * v, acc[r][v]);
}

// The exponential of 16 numbers where only a few are wanted.
LOWBIT_INLINE void exponentials(float* x) { store(x, exponential(load(x))); }

// Turns the scores of each row into weights relative to its new peak, in place; fade is what the row's
// earlier sums must be multiplied by.
template <size_t rows>
LOWBIT_INLINE void soften(float* scores, const Span* spans, float* peak, float* sum, float* fade) {
  static const float kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float base[rows];
  alignas(64) float steps[16] = {};
  for (size_t r = 0; r < rows; ++r) {
    float* row = scores + r * kAttentionBlock;
    if (spans[r].first > 0 || spans[r].last < kAttentionBlock) {
      const F32 first = set1(static_cast<float>(spans[r].first)),
                last = set1(static_cast<float>(spans[r].last));
      for (size_t v = 0; v < kVectors; ++v) {
        const F32 index = add(load(kLane), set1(static_cast<float>(16 * v)));
        const F32 seen = select_gt(last, index, load(row + 16 * v), set1(kHidden));
        store(row + 16 * v, select_gt(first, index, set1(kHidden), seen));
      }
    }
    const F32 ab = max(load(row), load(row + 16)), cd = max(load(row + 32), load(row + 48));
    const float top = reduce_max(max(ab, cd));
    const float next = peak[r] > top ? peak[r] : top;
    base[r] = next == kHidden ? 0.0f : next;  // a row that has seen no key yet stays at peak -inf, sum 0
    steps[r] = peak[r] - base[r];
    peak[r] = next;
  }
  exponentials(steps);
  for (size_t r = 0; r < rows; ++r) {
    float* row = scores + r * kAttentionBlock;
    const F32 b = set1(base[r]);
    F32 w[kVectors];
    for (size_t v = 0; v < kVectors; ++v) {
      w[v] = exponential(sub(load(row + 16 * v), b));
      store(row + 16 * v, w[v]);
    }
    fade[r] = steps[r];
    sum[r] = sum[r] * fade[r] + reduce_add(add(add(w[0], w[1]), add(w[2], w[3])));
  }
}

// A block of 64 keys: keys [4][head_dim][16], values [64][stride], and where the next block's lie.
template <typename Number>
struct Block {
  size_t position;
  const Number *keys, *values;
  const Number *next_keys, *next_values;
};

// One block for `rows` rows.
template <size_t rows, typename Number>
void attend_rows(const AttentionTile& t, size_t row, const Block<Number>& b, const AttentionState& state) {
  alignas(64) float scores[rows * kAttentionBlock];
  float fade[rows];
  Span spans[rows];
  size_t first = kAttentionBlock, last = 0;
  for (size_t r = 0; r < rows; ++r) {
    spans[r] = visible(t.position + (row + r) / t.group, t.window, b.position, kAttentionBlock);
    if (spans[r].first < first) first = spans[r].first;
    if (spans[r].last > last) last = spans[r].last;
  }
  if (first >= last) return;

  const float* queries = t.queries + row * t.stride;
  const size_t step = t.head_dim * kKeyLanes, vectors = (last + 15) / 16;
  size_t v = 0;
  for (; v + kWide <= vectors; v += kWide)
    score<rows, kWide>(queries, t.stride, b.keys + v * step, b.next_keys, step, t.head_dim, scores + 16 * v);
  for (; v < vectors; ++v)
    score<rows, 1>(queries, t.stride, b.keys + v * step, b.next_keys, step, t.head_dim, scores + 16 * v);
  if (t.softcap != 0)
    for (size_t r = 0; r < rows; ++r)
      for (float* s = scores + r * kAttentionBlock; s < scores + r * kAttentionBlock + 16 * vectors; s += 16)
        store(s, soft_capped(load(s), t.softcap));
  for (size_t r = 0; r < rows; ++r)
    for (size_t key = 16 * vectors; key < kAttentionBlock; ++key) scores[r * kAttentionBlock + key] = kHidden;

  soften<rows>(scores, spans, state.peak + row, state.sum + row, fade);

  float* mixed = state.mixed + row * t.stride;
  size_t d = 0;
  for (; d + 16 * kWide <= t.stride; d += 16 * kWide)
    mix<rows, kWide>(scores, fade, b.values + d, b.next_values + d, t.stride, first, last, mixed + d);
  for (; kWide > 2 && d + 32 <= t.stride; d += 32)
    mix<rows, 2>(scores, fade, b.values + d, b.next_values + d, t.stride, first, last, mixed + d);
  for (; d < t.stride; d += 16)
    mix<rows, 1>(scores, fade, b.values + d, b.next_values + d, t.stride, first, last, mixed + d);
}

template <typename Number>
void attend_block(const AttentionTile& t, const Block<Number>& b, const AttentionState& state) {
  size_t row = 0;
  for (; row + kRows <= t.rows; row += kRows) attend_rows<kRows>(t, row, b, state);
  switch (t.rows - row) {  // never kRows or more: those cases are empty where kRows is 2
    case 5:
      return attend_rows<kRows == 6 ? 5 : 1>(t, row, b, state);
    case 4:
      return attend_rows<kRows == 6 ? 4 : 1>(t, row, b, state);
    case 3:
      return attend_rows<kRows == 6 ? 3 : 1>(t, row, b, state);
    case 2:
      return attend_rows<2>(t, row, b, state);
    case 1:
      return attend_rows<1>(t, row, b, state);
  }
}
static_assert(kRows == 6 || kRows == 2, "the remainders above are written for these");

void widen(const uint16_t* from, size_t n, float* to) {
  for (size_t i = 0; i < n; i += 16) store(to + i, load_fp16(from + i));
}

// Before the first block of a segment.
LOWBIT_INLINE void clear_state(const AttentionTile& t, const AttentionState& state) {
  for (size_t r = 0; r < t.rows; ++r) {
    state.peak[r] = kHidden;
    state.sum[r] = 0;
  }
  for (size_t i = 0; i < t.rows * t.stride; i += 16) store(state.mixed + i, zero_f32());
}

}  // namespace
}  // namespace lowbit::LOWBIT_ISA
