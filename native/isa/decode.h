// From stored planes to the bytes of a dot product, and from integer sums to scaled floats: the parts
// that the one-token and the many-token product share.
#pragma once

#include <utility>

#include "matrix.h"
#include "simd/simd.h"

namespace lowbit::LOWBIT_ISA {

constexpr size_t kSteps = kChunk / 4;

// Calls f with 0, 1, .. n - 1 as compile-time constants: loops over arrays of accumulators have to vanish
// before the compiler decides what lives in registers. The scalar set has no such registers, and unrolling
// everything would take minutes to compile, so there unroll() is a loop.
#define LOWBIT_EXPANDED __attribute__((always_inline))
template <typename F, size_t... i>
LOWBIT_INLINE void expand_over(std::index_sequence<i...>, F f) {
  (f(std::integral_constant<size_t, i>{}), ...);
}
template <size_t n, typename F>
LOWBIT_INLINE void expand(F f) {
  expand_over(std::make_index_sequence<n>{}, f);
}
#ifdef LOWBIT_ISA_scalar
template <size_t n, typename F>
inline void unroll(F f) {
  for (size_t i = 0; i < n; ++i) f(i);
}
#define LOWBIT_UNROLLED
#else
template <size_t n, typename F>
LOWBIT_INLINE void unroll(F f) {
  expand<n>(f);
}
#define LOWBIT_UNROLLED LOWBIT_EXPANDED
#endif

// The vectors of a tile's chunk.
template <int bits>
LOWBIT_INLINE void load_codes(const uint8_t* p, U8 (&v)[bits]) {
  expand<bits>([&](auto i) LOWBIT_EXPANDED { v[i] = load_once(p + 64 * i); });
}

#ifdef LOWBIT_BIT_MATRIX
// Bits [from, from + width) of each byte moved to bit `to` and up, zeros elsewhere.
template <int from, int width, int to>
LOWBIT_INLINE U8 placed(U8 x) {
  if constexpr (from == to) return and_(x, set1_u8(static_cast<uint8_t>(((1 << width) - 1) << to)));
  return place<bit_matrix(from, width, to)>(x);
}

// 3 bits: the third bits of two steps at a time go between the pairs of the first plane, which gives the
// codes of steps s and s + 2 in the nibbles of a byte.
template <size_t s>
LOWBIT_INLINE U8 two_codes_of_three(const U8 (&v)[3]) {
  constexpr uint64_t thirds = bit_matrix(s, 1, 2) | bit_matrix(s + 2, 1, 6);
  U8 pairs = v[s / 4];
  if constexpr (s % 4 != 0) pairs = shift_right_loose<2>(pairs);
  return merge(pairs, place<thirds>(v[2]), set1_u8(0x33));
}

// Step s of the vectors of a tile's chunk as codes, one per byte. Planes take the low bits of the code first,
// widest plane first (docs/formats.md).
template <int bits, size_t s>
LOWBIT_INLINE U8 code_step(const U8 (&v)[bits]) {
  if constexpr (bits == 8) return v[s];
  if constexpr (bits == 3) return placed<(s & 2) * 2, 4, 0>(two_codes_of_three<s & ~size_t{2}>(v));
  if constexpr (bits > 4) {  // the low nibble stays where it is, or comes down with its neighbour's bits
    constexpr bool two = (bits & 2) != 0;
    U8 more = placed<two ? s % 4 * 2 : s, two ? 2 : 1, 4>(v[4 + (two ? s / 4 : 0)]);
    if constexpr (bits == 7) more = or_(more, placed<s, 1, 6>(v[6]));
    const U8 low = s % 2 ? shift_right_loose<4>(v[s / 2]) : v[s / 2];
    return merge(low, more, set1_u8(0x0f));
  }
  if constexpr (bits == 4) return placed<s % 2 * 4, 4, 0>(v[s / 2]);
  if constexpr (bits == 2) return placed<s % 4 * 2, 2, 0>(v[s / 4]);
  if constexpr (bits == 1) return placed<s, 1, 0>(v[0]);
}

// Step s times a power of two, wherever it is cheapest: a mask runs on four ports, a shift on two, and a
// placement of bits on the two that multiply. Steps of one power have sums of their own, shifted at the end.
template <int bits>
constexpr size_t kPlaces = bits == 1   ? 4
                           : bits <= 4 ? 2
                                       : 1;
template <int bits>
constexpr int kPlaceShift = bits == 1   ? 1
                            : bits == 2 ? 2
                                        : 4;  // between the powers
template <int bits>
constexpr size_t place_of(size_t s) {
  return bits == 3 ? s / 2 % 2 : s % kPlaces<bits>;
}
template <int bits, size_t s>
LOWBIT_INLINE U8 placed_step(const U8 (&v)[bits]) {
  constexpr size_t place = place_of<bits>(s);
  const U8 mask = set1_u8(static_cast<uint8_t>(((1 << bits) - 1) << (place * kPlaceShift<bits>)));
  if constexpr (bits == 1) return and_(s < 4 ? v[0] : shift_right_loose<4>(v[0]), mask);
  if constexpr (bits == 2) return and_(s % 4 < 2 ? v[s / 4] : shift_right_loose<4>(v[s / 4]), mask);
  if constexpr (bits == 3) return and_(two_codes_of_three<s & ~size_t{2}>(v), mask);
  if constexpr (bits == 4) return and_(v[s / 2], mask);
  return code_step<bits, s>(v);
}

#else
// Bits [from, from + width) of each byte moved to bit `to` and up, zeros elsewhere.
template <int from, int width, int to>
LOWBIT_INLINE U8 placed(U8 x) {
  if constexpr (from > to) x = shift_right<from - to>(x);
  if constexpr (from < to) x = shift_left<to - from>(x);
  if constexpr (from + width == 8 && to == 0) return x;
  return and_(x, set1_u8(static_cast<uint8_t>(((1 << width) - 1) << to)));
}

// Step s of the vectors of a tile's chunk as codes, one per byte: see above.
template <int bits, size_t s>
LOWBIT_INLINE U8 code_step(const U8 (&v)[bits]) {
  constexpr bool four = (bits & 4) != 0, two = (bits & 2) != 0, one = (bits & 1) != 0;
  if constexpr (bits == 8) return v[s];
  U8 code;
  if constexpr (four) code = placed<s % 2 * 4, 4, 0>(v[s / 2]);
  if constexpr (two) {
    const U8 pair = placed<s % 4 * 2, 2, four ? 4 : 0>(v[(four ? 4 : 0) + s / 4]);
    if constexpr (four)
      code = or_(code, pair);
    else
      code = pair;
  }
  if constexpr (one) {
    const U8 bit = placed<s, 1, (four ? 4 : 0) + (two ? 2 : 0)>(v[bits - 1]);
    if constexpr (bits > 1)
      code = or_(code, bit);
    else
      code = bit;
  }
  return code;
}
#endif

// The 8 steps of a tile.
template <int bits>
LOWBIT_INLINE void unpack_codes(const uint8_t* p, U8 (&out)[kSteps]) {
  U8 v[bits];
  load_codes<bits>(p, v);
  expand<kSteps>([&](auto s) LOWBIT_EXPANDED { out[s] = code_step<bits, s>(v); });
}
template <int bits>
LOWBIT_INLINE U8 lookup(const uint8_t* table, U8 index) {
  if constexpr (bits <= 4) return lookup16(table, index);
  if constexpr (bits == 5 || bits == 6) return lookup64(table, index);
  return lookup256(table, index);
}

LOWBIT_INLINE F32 load_number(Number type, const void* base, size_t index) {
  switch (type) {
    case Number::fp32:
      return load(static_cast<const float*>(base) + index);
    case Number::bf16:
      return load_bf16(static_cast<const uint16_t*>(base) + index);
    case Number::e8m0: {
      // 2^(code - 127). As bits of a float the code is the exponent field; code 0 (2^-127, a subnormal)
      // reads as 0, which is how padded rows are stored.
      return from_bits(shift_left<23>(load_u8_i32(static_cast<const uint8_t*>(base) + index)));
    }
    case Number::e4m3: {
      // Exponent and mantissa moved to a float's fields give |value| * 2^-120, exactly (subnormals too).
      const I32 code = load_u8_i32(static_cast<const uint8_t*>(base) + index);
      const I32 magnitude = and_(code, set1_i32(127));
      const F32 value = mul(from_bits(shift_left<20>(magnitude)), set1(0x1p120f));
      return from_bits(add(bits(value), shift_left<24>(sub(code, magnitude))));  // 128 becomes the sign
    }
    default:
      return load_fp16(static_cast<const uint16_t*>(base) + index);
  }
}

// The scales of 16 rows from `lane` of a block in one group, and the offsets of a term that has them.
LOWBIT_INLINE F32 times_factors(const uint16_t* wide, const uint8_t* factors) {
  const I32 factor = shift_right<24>(shift_left<24>(load_u8_i32(factors)));  // int8
  return mul(load_fp16(wide), to_f32(factor));
}
LOWBIT_INLINE F32 group_scale(const CodeTerm& t, size_t block, size_t group, size_t lane) {
  const size_t row = block * t.groups + group, index = row * kBlockRows + lane;
  if (!t.factors) return mul(load_number(t.scale_type, t.scales, index), set1(t.unit));
  const uint16_t* const wide = static_cast<const uint16_t*>(t.scales) + row / t.span * kBlockRows + lane;
  return mul(times_factors(wide, t.factors + index), set1(t.unit));
}
LOWBIT_INLINE F32 group_offset(const CodeTerm& t, size_t block, size_t group, size_t lane) {
  const size_t row = block * t.groups + group, index = row * kBlockRows + lane;
  if (!t.offset_factors) return load_number(t.offset_type, t.offsets, index);
  const uint16_t* const wide = static_cast<const uint16_t*>(t.offsets) + row / t.span * kBlockRows + lane;
  return times_factors(wide, t.offset_factors + index);
}

// End of the segment of inputs that starts at k, in a weight group that ends at group_end: within it both
// the weight scale and the activation scale are constant.
LOWBIT_INLINE size_t segment_end(size_t k, size_t group_end, size_t padded) {
  const size_t activation = (k / kActivationGroup + 1) * kActivationGroup;
  const size_t end = activation < group_end ? activation : group_end;
  return end < padded ? end : padded;
}

// What a segment's integer sums are scaled by, per token.
struct SegmentScale {
  int32_t sum;       // of the segment's integer activations
  float activation;  // their scale
};

LOWBIT_INLINE SegmentScale segment_scale(const Activations& a, size_t token, size_t k, size_t end) {
  const int32_t* sums = a.sums + token * (a.padded / kSumStride + 1);
  return {sums[end / kSumStride] - sums[k / kSumStride], a.scales[token * a.groups + k / kActivationGroup]};
}

// In which order segments are scaled. One of the two scales is often constant over several segments, a *run*:
// the weights' where their group is a row or whole activation groups, the activations' where weight groups
// are halves or quarters of 64. Sums are scaled by the other, inner, scale as they are added up over the run,
// and its total by the outer one: one multiplication less for each segment but the first.
struct Runs {
  bool weights_outer;  // else the activations' scale is
  bool single;         // each segment is a run of its own
  bool first(size_t k, size_t group_begin) const {
    return single || (weights_outer ? k == group_begin : k % kActivationGroup == 0);
  }
  bool last(size_t end, size_t group_end, size_t stop) const {
    return single || (weights_outer ? end == group_end : end % kActivationGroup == 0 || end == stop);
  }
};

inline Runs runs_of(const CodeTerm& t) {
  if (t.groups == 1 || t.group_size % kActivationGroup == 0) return {true, t.group_size == kActivationGroup};
  return {false, kActivationGroup % t.group_size != 0};
}

// The term's scales, zero points and offsets of one tile in one group, loaded once for all tokens.
struct TileScale {
  F32 scale, offset;
  I32 zero_point;
};

// A plain term has a scale only, and neighbouring codes one level apart: nearly every format. So has one with
// multipliers, whose panel holds products.
inline bool is_plain(const CodeTerm& t) {
  return !t.zero_points && !t.offsets && (t.map != Map::linear || t.step == 1 || t.multipliers);
}

template <bool plain>
LOWBIT_INLINE TileScale tile_scale(const CodeTerm& t, size_t block, size_t group, size_t tile) {
  TileScale s = {};
  s.scale = group_scale(t, block, group, tile * kTileRows);
  if constexpr (!plain) {
    const size_t index = (block * t.groups + group) * kBlockRows + tile * kTileRows;
    if (t.zero_points) s.zero_point = load_u8_i32(t.zero_points + index);
    if (t.offsets) s.offset = group_offset(t, block, group, tile * kTileRows);
  }
  return s;
}

// Bytes that take the whole range: levels + 128 of tables, codes of 8 bits.
template <int bits, Map map>
constexpr bool is_wide = map != Map::linear || bits == 8;

// What the integer sum of a segment starts from. Codes are unsigned, so the sum of (code + base) * x is the
// dot product plus base * sum(x). A term that is not plain adds this at the end instead. Where wide bytes are
// multiplied as signed numbers, 128 less than they say, 128 * sum(x) is added.
template <int bits, Map map, bool plain>
LOWBIT_INLINE I32 start(int32_t base, const SegmentScale& s) {
  constexpr int32_t lowered = is_wide<bits, map> && kSignedBytes ? 128 : 0;
  if constexpr (map != Map::linear) return set1_i32((lowered - 128) * s.sum);
  return set1_i32(((plain ? base : 0) + lowered) * s.sum);
}

// (level - zero_point) . x as a float, where dot[weight limb][activation limb] are a segment's sums. The
// integer parts are exact and stay within int32: 319 * 16256 * 64 < 2^29. Summing the limbs of activations:
// the low limb's sum starts at start(), the high one's at zero.
template <Map map, bool plain, int weight_limbs, int limbs>
LOWBIT_INLINE F32 segment_total(const I32 (&dot)[weight_limbs][limbs], const CodeTerm& t, const TileScale& w,
                                const SegmentScale& s) {
  I32 sum = dot[0][0];
  if constexpr (limbs == 2) sum = add(shift_left<7>(sum), dot[0][1]);
  if constexpr (map == Map::linear && !plain) sum = add(mul(sum, set1_i32(t.step)), set1_i32(t.base * s.sum));
  if constexpr (weight_limbs == 1) {
    if constexpr (!plain) {
      if (t.zero_points) sum = sub(sum, mul(w.zero_point, set1_i32(s.sum)));
    }
    return to_f32(sum);
  } else {
    I32 lower = dot[1][0];
    if constexpr (limbs == 2) lower = add(shift_left<7>(lower), dot[1][1]);
    if constexpr (!plain) {
      if (t.zero_points) lower = sub(lower, mul(w.zero_point, set1_i32(s.sum)));
    }
    return fma(to_f32(sum), set1(static_cast<float>(kLimbBase)), to_f32(lower));
  }
}

// Takes a segment's total into its run and, at the run's end, the run into f. This is the one definition of
// what happens to sums once they are floats; offset * activation * sum(x) is added segment by segment.
template <bool plain>
LOWBIT_INLINE void add_total(F32& f, F32& run, F32 total, bool first, bool last, bool weights_outer,
                             const CodeTerm& t, const TileScale& w, const SegmentScale& s) {
  const F32 activation = set1(s.activation);
  const F32 inner = weights_outer ? activation : w.scale;
  run = first ? mul(total, inner) : fma(total, inner, run);
  if (last) f = fma(run, weights_outer ? w.scale : activation, f);
  if constexpr (!plain) {
    if (t.offsets) f = fma(w.offset, set1(static_cast<float>(s.sum) * s.activation), f);
  }
}

template <Map map>
constexpr int kWeightLimbs = map == Map::table2 ? 2 : 1;

}  // namespace lowbit::LOWBIT_ISA
