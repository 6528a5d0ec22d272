// Attention in integers over one segment of 8-bit keys and values.
//
// A query is int8 with one scale per 64 channels, like the keys. Scores are exact int32 sums, scaled once, as
// binary logarithms:
//   t[key] = sum over groups (q . k) * query_scale * key_scale + log2(value_scale[key])
// The weights of a segment are w[key] = kWeightLevels * 2^(t[key] - max t): the value's own scale is in them,
// so that 8 bits resolve best where the weighted *values* are largest (the first token of a text takes most
// of the probability and has tiny values). Then
//   mixed = sum over keys round(w) * value_code     exact in int32
//   sum   = sum over keys w / value_scale           the probabilities themselves, in float32
// and attention is mixed / sum, as in attention.cc. The maximum is taken over the keys of a segment that the
// query sees, segments are folded in order, and hidden keys add zeros in the same trees: a query's arithmetic
// depends on its position only.
//
// Work is done in groups of kRows rows, all accumulators in registers:
//   scores  [rows][64 keys]    += key[16 keys][4]        . query[4] (broadcast)    for every 4 channels
//   mixed   [rows][channels]   += value[16 channels][4]  . weight[4] (broadcast)   for every 4 keys
#include "attention.h"
#include "decode.h"
#include "decoder_kernels.h"
#include "exponential.h"
#include "kv_cache.h"

namespace lowbit::LOWBIT_ISA {
namespace {

constexpr size_t kWords = kAttentionBlock / 4;  // steps of four keys in a block
constexpr size_t kFetchAhead = 2048;            // bytes; keys, values and scales of a head are neighbours
static_assert(kAttentionBlock == 64, "four vectors of weights become one vector of bytes");

// GCC 12 copies the sum of the intrinsic to another register and back; a tied operand keeps it where it is.
#if defined(LOWBIT_ISA_avx512)
LOWBIT_INLINE I32 dot(I32 acc, U8 w, I32 a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(a.v));
  return acc;
}
#else
LOWBIT_INLINE I32 dot(I32 acc, U8 w, I32 a) { return dot4(acc, w, a); }
#endif

// What scores start from where they are capped before the logs of value scales are added.
alignas(64) const float kNoLogs[kAttentionBlock] = {};

// Scores of 64 keys over one group of channels. base: what the sums are added to, logs of value scales for
// the first group (base_stride 0) and the scores so far for the others.
template <size_t rows>
__attribute__((noinline)) void score(const IntegerTile& t, size_t row, size_t group, const uint8_t* keys,
                                     const float* key_scales, const float* base, size_t base_stride,
                                     size_t ahead, float* scores) {
  const size_t first = group * kKeyGroup, key_step = t.head_dim * kKeyLanes;
  const size_t steps = (t.head_dim - first < kKeyGroup ? t.head_dim - first : kKeyGroup) / 4;
  const int8_t* q = t.queries + row * t.stride + first;
  const size_t groups = t.groups, stride = t.stride;
  const int32_t* starts = t.starts + row * groups + group;
  const float* scales = t.scales + row * groups + group;
  keys += first / 4 * 64;
  for (size_t half = 0; half < 4; half += kWide) {
    I32 acc[rows][kWide];
    unroll<rows>([&](auto r) LOWBIT_UNROLLED {
      unroll<kWide>([&](auto v) LOWBIT_UNROLLED { acc[r][v] = set1_i32(starts[r * groups]); });
    });
    const uint8_t* p = keys + half * key_step;
    for (size_t s = 0; s < steps; ++s, p += 64) {
      U8 key[kWide];
      unroll<kWide>([&](auto v) LOWBIT_UNROLLED {
        key[v] = load_u8(p + v * key_step);
        __builtin_prefetch(p + v * key_step + ahead);
      });
      unroll<rows>([&](auto r) LOWBIT_UNROLLED {
        const I32 x = broadcast4(q + r * stride + 4 * s);
        unroll<kWide>([&](auto v) LOWBIT_UNROLLED { acc[r][v] = dot(acc[r][v], key[v], x); });
      });
    }
    unroll<kWide>([&](auto v) LOWBIT_UNROLLED {
      const size_t lane = 16 * (half + v);
      const F32 scale = load(key_scales + lane);
      unroll<rows>([&](auto r) LOWBIT_UNROLLED {
        const F32 start = load(base + r * base_stride + lane);
        store(scores + r * kSegment + lane,
              fma(to_f32(acc[r][v]), mul(scale, set1(scales[r * groups])), start));
      });
    });
  }
}

// Turns a row's scores of blocks [first, last) into weights of a byte each, in the order in which mix() reads
// them. Returns the largest score; sum is that of the weights over their values' scales.
LOWBIT_INLINE float soften(float* scores, Span seen, size_t first, size_t last, const float* inverses,
                           uint8_t* weights, float* sum) {
  static const float kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if (seen.first > first * kAttentionBlock || seen.last < last * kAttentionBlock) {
    const F32 from = set1(static_cast<float>(seen.first)), to = set1(static_cast<float>(seen.last));
    for (size_t i = first * kAttentionBlock; i < last * kAttentionBlock; i += 16) {
      const F32 index = add(load(kLane), set1(static_cast<float>(i)));
      const F32 left = select_gt(to, index, load(scores + i), set1(kHidden));
      store(scores + i, select_gt(from, index, set1(kHidden), left));
    }
  }
  F32 tops[4] = {set1(kHidden), set1(kHidden), set1(kHidden), set1(kHidden)};
  for (size_t i = first * kAttentionBlock; i < last * kAttentionBlock; i += 64)
    unroll<4>([&](auto v) LOWBIT_UNROLLED { tops[v] = max(tops[v], load(scores + i + 16 * v)); });
  const float top = reduce_max(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
  const F32 base = set1(top == kHidden ? 0.0f : top);  // a row that sees no key has weights and sum 0
  F32 sums[4] = {zero_f32(), zero_f32(), zero_f32(), zero_f32()};
  for (size_t i = first * kAttentionBlock; i < last * kAttentionBlock; i += 64) {
    I32 bytes[4];
    unroll<4>([&](auto v) LOWBIT_UNROLLED {
      const F32 w = power_of_two(sub(load(scores + i + 16 * v), base), kWeightLevels);
      sums[v] = fma(w, load(inverses + i + 16 * v), sums[v]);
      bytes[v] = bits(add(w, set1(0x1p23f)));  // rounds to even; the integer is in the low bits
    });
    // Shifts push the exponents of 2^23 out, except that of the first.
    const I32 low = add(sub(bytes[0], bits(set1(0x1p23f))), shift_left<8>(bytes[1]));
    const I32 high = add(shift_left<16>(bytes[2]), shift_left<24>(bytes[3]));
    store_i32(reinterpret_cast<int32_t*>(weights + i), add(low, high));
  }
  *sum = reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  return top;
}

// mixed[row][16 v ..] of `rows` rows over keys in words [first, last) of four: fresh where `old` is null,
// else old * mixed + now * sums.
template <size_t rows, size_t vectors>
__attribute__((noinline)) void mix(const uint8_t* weights, const int8_t* values, size_t stride, size_t first,
                                   size_t last, size_t ahead, const float* old, const float* now,
                                   float* mixed) {
  I32 acc[rows][vectors];
  unroll<rows * vectors>([&](auto i) LOWBIT_UNROLLED { acc[i / vectors][i % vectors] = zero_i32(); });
  const int8_t* p = values + first * 4 * stride;
  for (size_t word = first; word < last; ++word, p += 4 * stride) {
    I32 value[vectors];
    unroll<vectors>([&](auto v) LOWBIT_UNROLLED {
      value[v] = load_s8(p + 64 * v);
      __builtin_prefetch(p + 64 * v + ahead);
    });
    unroll<rows>([&](auto r) LOWBIT_UNROLLED {
      const U8 w = broadcast4_u8(weights + r * kSegment + 4 * word);
      unroll<vectors>([&](auto v) LOWBIT_UNROLLED { acc[r][v] = dot(acc[r][v], w, value[v]); });
    });
  }
  unroll<rows>([&](auto r) LOWBIT_UNROLLED {
    float* out = mixed + r * stride;
    unroll<vectors>([&](auto v) LOWBIT_UNROLLED {
      const F32 sum = to_f32(acc[r][v]);
      store(out + 16 * v, old ? fold(load(out + 16 * v), sum, old[r], now[r]) : sum);
    });
  });
}

// One segment for `rows` rows.
template <size_t rows>
void attend_rows(const IntegerTile& t, size_t row, const KvIntegers& kv, size_t segment, bool fresh,
                 size_t ahead, const AttentionState& state) {
  alignas(64) float scores[rows * kSegment];
  alignas(64) uint8_t weights[rows * kSegment];
  alignas(64) float peaks[16] = {}, sums[16] = {}, old[16], now[16];
  Span spans[rows];
  size_t first = kSegment, last = 0;
  for (size_t r = 0; r < rows; ++r) {
    spans[r] = visible(t.position + (row + r) / t.group, t.window, segment, kSegment);
    if (spans[r].first < first) first = spans[r].first;
    if (spans[r].last > last) last = spans[r].last;
  }
  float* mixed = state.mixed + row * t.stride;
  if (first >= last) {
    if (!fresh) return;
    for (size_t r = 0; r < rows; ++r) state.peak[row + r] = kHidden, state.sum[row + r] = 0;
    for (size_t i = 0; i < rows * t.stride; i += 16) store(mixed + i, zero_f32());
    return;
  }
  const size_t block = first / kAttentionBlock, stop = (last + kAttentionBlock - 1) / kAttentionBlock;
  if (ahead)  // what keys and values are scaled by lies apart from them, 64 bytes for 16 keys
    for (size_t i = block * kAttentionBlock; i < stop * kAttentionBlock; i += 16) {
      for (size_t g = 0; g < t.groups; ++g) __builtin_prefetch(kv.key_scales + g * kSegment + i);
      __builtin_prefetch(kv.value_logs + i);
      __builtin_prefetch(kv.value_inverses + i);
    }
  for (size_t b = block; b < stop; ++b) {
    const uint8_t* keys = kv.keys + b * kAttentionBlock * t.head_dim;
    const float* scales = kv.key_scales + b * kAttentionBlock;
    float* out = scores + b * kAttentionBlock;
    const float* logs = kv.value_logs + b * kAttentionBlock;
    score<rows>(t, row, 0, keys, scales, t.softcap != 0 ? kNoLogs : logs, 0, ahead, out);
    for (size_t g = 1; g < t.groups; ++g)
      score<rows>(t, row, g, keys, scales + g * kSegment, out, kSegment, ahead, out);
    if (t.softcap != 0)
      for (size_t r = 0; r < rows; ++r)
        for (size_t i = 0; i < kAttentionBlock; i += 16) {
          float* s = out + r * kSegment + i;
          store(s, add(soft_capped(load(s), t.softcap), load(logs + i)));
        }
  }
  for (size_t r = 0; r < rows; ++r)
    peaks[r] = soften(scores + r * kSegment, spans[r], block, stop, kv.value_inverses, weights + r * kSegment,
                      sums + r);
  const AttentionState part = {peaks, sums, nullptr};
  const AttentionState total = {state.peak + row, state.sum + row, nullptr};
  if (fresh) {
    for (size_t r = 0; r < rows; ++r) total.peak[r] = peaks[r], total.sum[r] = sums[r];
  } else {
    fold_sums(rows, total, part, kLn2, old, now);
  }
  // A block with few keys to see leaves its later words empty.
  const size_t rest = last - (stop - 1) * kAttentionBlock;
  const size_t words = (stop - 1) * kWords + (rest < kWords ? rest : kWords);
  const float* fade = fresh ? nullptr : old;
  size_t d = 0;
  for (; d + 16 * kWide <= t.stride; d += 16 * kWide)
    mix<rows, kWide>(weights, kv.values + 4 * d, t.stride, block * kWords, words, ahead, fade, now,
                     mixed + d);
  for (; kWide > 2 && d + 32 <= t.stride; d += 32)
    mix<rows, 2>(weights, kv.values + 4 * d, t.stride, block * kWords, words, ahead, fade, now, mixed + d);
  for (; d < t.stride; d += 16)
    mix<rows, 1>(weights, kv.values + 4 * d, t.stride, block * kWords, words, ahead, fade, now, mixed + d);
}

void attend_integers(const IntegerTile& t, const KvIntegers& kv, size_t segment, bool fresh,
                     const AttentionState& state) {
  const size_t ahead = t.rows <= 2 * kRows ? kFetchAhead : 0;  // for many rows the segment is in the cache
  size_t row = 0;
  for (; row + kRows <= t.rows; row += kRows) attend_rows<kRows>(t, row, kv, segment, fresh, ahead, state);
  switch (t.rows - row) {  // never kRows or more: those cases are empty where kRows is 2
    case 5:
      return attend_rows<kRows == 6 ? 5 : 1>(t, row, kv, segment, fresh, ahead, state);
    case 4:
      return attend_rows<kRows == 6 ? 4 : 1>(t, row, kv, segment, fresh, ahead, state);
    case 3:
      return attend_rows<kRows == 6 ? 3 : 1>(t, row, kv, segment, fresh, ahead, state);
    case 2:
      return attend_rows<2>(t, row, kv, segment, fresh, ahead, state);
    case 1:
      return attend_rows<1>(t, row, kv, segment, fresh, ahead, state);
  }
}
static_assert(kRows == 6 || kRows == 2, "the remainders above are written for these");

}  // namespace

void add_integer_attention_kernels(DecoderKernels& table) { table.attend_integers = attend_integers; }

}  // namespace lowbit::LOWBIT_ISA
