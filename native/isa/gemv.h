// The kernels of one token, by a term's stored form.
#pragma once

#include "isa/decode.h"

namespace lowbit::LOWBIT_ISA {

// A run of inputs [k, end) that share the weights' and the activations' scales: whole groups of 16, within 64
// from a multiple of 64.
struct Segment {
  size_t k, end, group;
  int32_t start;  // added to every sum of the low (or only) limb of activations
  bool last;      // the run of segments ends here, see Runs
  SegmentScale scale;
};

// What segments are cut from: a block and a token.
struct Operands {
  const uint8_t* codes;
  const uint8_t* selectors;    // [groups][32], or null
  const uint8_t* multipliers;  // [multiplier_groups][16], or null
  const int8_t* high;
  const int8_t* low;
  const int32_t* sums;           // prefix sums of the activations
  const uint8_t* const* tables;  // of the activations, see table.cc
  size_t chunks;
};

// The sums of both tiles of `count` segments: sums[segment][tile][weight limb][activation limb]. Many at a
// time, since a call costs as much as half a segment.
using SegmentSums = void (*)(const CodeTerm& term, const Operands& o, const Segment* segments, size_t count,
                             I32* sums);
SegmentSums segment_sums(const CodeTerm& term, int limbs);
SegmentSums base3_sums(const CodeTerm& term, int limbs);

// acc[block][32] += `blocks` blocks of codes times one token; scratch: see gemv_scratch_bytes().
using Gemv = void (*)(const CodeTerm& term, size_t block, size_t blocks, const Activations& a, size_t token,
                      float* acc, uint8_t* scratch);
// The kernel for a term that the fast ones of this instruction set cover, or null.
Gemv fast_gemv(const CodeTerm& term, int limbs);
Gemv base3_gemv(const CodeTerm& term);  // linear and plain, one limb of activations

// Bytes that the stream of codes is fetched ahead of its use: the hardware's own prefetch stops at each page.
// Straight to the first-level cache and not into the second: weights are read once per token.
constexpr size_t kAhead = 8192;
template <size_t lines>
LOWBIT_INLINE void fetch_ahead(const uint8_t* p) {
  unroll<lines>([&](auto line) LOWBIT_UNROLLED { __builtin_prefetch(p + kAhead + 64 * line, 0, 0); });
}

// Products of fp16 numbers of `span` groups and int8 factors of each: a block of them as floats.
inline void block_factors(const CodeTerm& t, size_t block, const void* stored, const uint8_t* factors,
                          float unit, float* out) {
  const size_t supers = t.groups / t.span;
  const uint16_t* wide = static_cast<const uint16_t*>(stored) + block * supers * kBlockRows;
  factors += block * t.groups * kBlockRows;
  for (size_t line = 0; line < t.groups * kBlockRows; line += 64)
    __builtin_prefetch(factors + t.groups * kBlockRows + line, 0, 2);
  for (size_t super = 0; super < supers; ++super, wide += kBlockRows)
    for (size_t group = 0; group < t.span; ++group, factors += kBlockRows, out += kBlockRows)
      for (size_t lane = 0; lane < kBlockRows; lane += kTileRows)
        store(out + lane, mul(times_factors(wide + lane, factors + lane), set1(unit)));
}

// All offsets of a block as floats.
inline void block_offsets(const CodeTerm& t, size_t block, float* out) {
  if (t.offset_factors) return block_factors(t, block, t.offsets, t.offset_factors, 1.0f, out);
  const size_t count = t.groups * kBlockRows;
  for (size_t i = 0; i < count; i += kTileRows)
    store(out + i, load_number(t.offset_type, t.offsets, block * count + i));
}

// All scales of a block as floats. Doing this first keeps the many types of scales out of the loops and
// fetches what the next block needs: scales are read too slowly for the hardware to see a stream.
inline void block_scales(const CodeTerm& t, size_t block, float* out, bool fetch_next = true) {
  if (t.factors) return block_factors(t, block, t.scales, t.factors, t.unit, out);
  const size_t count = t.groups * kBlockRows, size = number_bytes(t.scale_type);
  const uint8_t* next = static_cast<const uint8_t*>(t.scales) + (block + 1) * count * size;
  if (fetch_next)
    for (size_t line = 0; line < count * size; line += 64) __builtin_prefetch(next + line, 0, 2);
  const F32 unit = set1(t.unit);
  const auto convert = [&](Number type) LOWBIT_EXPANDED {
    for (size_t i = 0; i < count; i += kTileRows)
      store(out + i, mul(load_number(type, t.scales, block * count + i), unit));
  };
  if (t.scale_type == Number::fp16) return convert(Number::fp16);
  if (t.scale_type == Number::e4m3) return convert(Number::e4m3);
  if (t.scale_type == Number::e8m0) return convert(Number::e8m0);
  return convert(Number::fp32);
}

// Sums of products of a tile's bytes over up to kRunSteps steps. Bytes of tables and of 8-bit codes take the
// whole range of a byte: where kSignedBytes, they stand for byte - 128 (see start() in decode.h).
template <int bits, Map map>
constexpr bool kLowered = is_wide<bits, map> && kSignedBytes;
template <int bits, Map map>
constexpr size_t kRunSteps = kLowered<bits, map> ? 16 : run_steps(is_wide<bits, map> ? 255 : (1 << bits) - 1);
template <int bits, Map map>
struct WideRun {
  std::conditional_t<kLowered<bits, map>, I32, Run> sum;
  LOWBIT_INLINE void begin(I32 acc) {
    if constexpr (kLowered<bits, map>)
      sum = acc;
    else
      sum = begin_run(acc);
  }
  LOWBIT_INLINE void add(U8 w, I32 a) {
    if constexpr (kLowered<bits, map>)
      sum = dot4_signed(sum, xor_(w, set1_u8(0x80)), a);
    else
      sum = dot_run(sum, w, a);
  }
  LOWBIT_INLINE void end(I32& acc) const {
    if constexpr (kLowered<bits, map>)
      acc = sum;
    else
      acc = end_run(acc, sum);
  }
};

// acc += steps of a tile's bytes times as many fours of activations.
template <int bits, Map map, size_t count>
LOWBIT_INLINE I32 dot_chunk(I32 acc, const U8 (&w)[count], const int8_t* x) {
  constexpr size_t steps = kRunSteps<bits, map> < count ? kRunSteps<bits, map> : count;
  unroll<count / steps>([&](auto r) LOWBIT_UNROLLED {
    WideRun<bits, map> run;
    run.begin(acc);
    unroll<steps>([&](auto s)
                      LOWBIT_UNROLLED { run.add(w[r * steps + s], broadcast4(x + 4 * (r * steps + s))); });
    run.end(acc);
  });
  return acc;
}

}  // namespace lowbit::LOWBIT_ISA
