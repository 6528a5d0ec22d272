// Integer sums of one segment of a block, decoded in registers: what every one-token product is made of. One
// body per width and kind of levels; what surrounds it (gemv.cc) is compiled once.
#include <cstring>

#include "gemv.h"

namespace lowbit::LOWBIT_ISA {
namespace {

// The bytes of a dot product from codes, the low limb of two-byte levels too.
template <int bits, Map map, bool selected>
LOWBIT_INLINE void look_up(const CodeTerm& t, U8 selector, U8 code, U8& high, U8& low) {
  if constexpr (selected) code = or_(code, selector);
  const auto find = [&](const uint8_t* table) LOWBIT_EXPANDED {
    if constexpr (selected) return lookup64(table, code);
    return lookup<bits>(table, code);
  };
  if constexpr (map == Map::table2) low = find(t.low);
  high = map == Map::linear ? code : find(t.high);
}

#ifdef LOWBIT_BIT_MATRIX
// Codes of linear levels stay at their places (placed_step), with sums of their own; there are 8 sums in the
// two tiles, so that a dot product need not wait 4 cycles for the one before it.
template <int bits, Map map, int limbs>
struct TileSums {
  static constexpr size_t places = map == Map::linear ? kPlaces<bits> : 1;
  static constexpr size_t each = places * kWeightLimbs<map> * limbs, chains = each < 4 ? 4 / each : 1;
  I32 dot[kWeightLimbs<map>][limbs][places][chains];

  LOWBIT_INLINE void begin(I32 start) {
    unroll<kWeightLimbs<map> * limbs>([&](auto i) LOWBIT_UNROLLED {
      auto& sums = dot[i / limbs][i % limbs];
      unroll<places * chains>([&](auto p) LOWBIT_UNROLLED { sums[p / chains][p % chains] = zero_i32(); });
      if (i % limbs == limbs - 1) sums[0][0] = start;
    });
  }
  LOWBIT_INLINE I32 joined(size_t w, size_t limb) const {
    I32 place[places];
    unroll<places>([&](auto p) LOWBIT_UNROLLED {
      const auto& chain = dot[w][limb][p];
      place[p] = chain[0];
      if constexpr (chains == 2) place[p] = add(chain[0], chain[1]);
      if constexpr (chains == 4) place[p] = add(add(chain[0], chain[1]), add(chain[2], chain[3]));
    });
    I32 sum = place[places - 1];
    if constexpr (places > 1) {
      expand<places - 1>([&](auto p) LOWBIT_EXPANDED {
        sum = add(place[places - 2 - p], shift_right<kPlaceShift<bits>>(sum));
      });
    }
    return sum;
  }
};

template <int bits, Map map, bool selected, size_t s>
LOWBIT_INLINE void step_bytes(const CodeTerm& t, const U8 (&v)[bits], U8 selector, U8& high, U8& low) {
  if constexpr (map == Map::linear) {
    high = placed_step<bits, s>(v);
  } else if constexpr (bits == 4) {  // tables of 16 need no mask, those chosen by a selector take it as one
    U8 index = s % 2 ? shift_right_loose<4>(v[s / 2]) : v[s / 2];
    if constexpr (selected) index = merge(index, selector, set1_u8(0x0f));
    const auto find = [&](const uint8_t* table) LOWBIT_EXPANDED {
      return selected ? lookup64(table, index) : lookup_low4(table, index);
    };
    if constexpr (map == Map::table2) low = find(t.low);
    high = find(t.high);
  } else {
    look_up<bits, map, selected>(t, selector, code_step<bits, s>(v), high, low);
  }
}

// Steps [from, from + count) of a chunk of both tiles, step by step, so that the tiles share each broadcast.
template <int bits, Map map, bool selected, int limbs, size_t from, size_t count>
LOWBIT_INLINE void dot_steps(TileSums<bits, map, limbs> (&sums)[2], const CodeTerm& t, const uint8_t* codes,
                             const U8 (&selector)[2], const int8_t* x, const int8_t* y) {
  using Sums = TileSums<bits, map, limbs>;
  U8 v[2][bits];
  load_codes<bits>(codes, v[0]);
  load_codes<bits>(codes + 64 * bits, v[1]);
  expand<count>([&](auto i) LOWBIT_EXPANDED {
    constexpr size_t s = from + i, place = map == Map::linear ? place_of<bits>(s) : 0;
    constexpr size_t chain = (bits == 3 && Sums::places == 2 ? s % 2 : s / Sums::places) % Sums::chains;
    const I32 a = broadcast4(x + 4 * s), b = limbs == 2 ? broadcast4(y + 4 * s) : a;
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      auto& dot = sums[tile].dot;
      U8 w[2];
      step_bytes<bits, map, selected, s>(t, v[tile], selector[tile], w[0], w[1]);
      unroll<kWeightLimbs<map> * limbs>([&](auto j) LOWBIT_UNROLLED {
        I32& sum = dot[j / limbs][j % limbs][place][chain];
        sum = dot4(sum, w[j / limbs], j % limbs ? b : a);
      });
    });
  });
}

template <int bits, Map map, bool selected, int limbs>
LOWBIT_INLINE void segment_dots(const CodeTerm& t, const Operands& o, const Segment& s,
                                const U8 (&selector)[2], I32 (&dot)[2][kWeightLimbs<map>][limbs]) {
  TileSums<bits, map, limbs> sums[2];
  sums[0].begin(set1_i32(s.start));
  sums[1].begin(set1_i32(s.start));
  const uint8_t* codes = o.codes + s.k / kChunk * 2 * 64 * bits;
  for (size_t c = s.k / kChunk * kChunk; c < s.end; c += kChunk, codes += 2 * 64 * bits) {
    const int8_t* x = o.high + c;
    const int8_t* y = limbs == 2 ? o.low + c : x;
    if (c >= s.k && c + kChunk <= s.end) {
      dot_steps<bits, map, selected, limbs, 0, kSteps>(sums, t, codes, selector, x, y);
    } else if (c >= s.k) {
      dot_steps<bits, map, selected, limbs, 0, kSteps / 2>(sums, t, codes, selector, x, y);
      continue;  // the other half fetches ahead
    } else {
      dot_steps<bits, map, selected, limbs, kSteps / 2, kSteps / 2>(sums, t, codes, selector, x, y);
    }
    fetch_ahead<2 * bits>(codes);
  }
  unroll<2 * kWeightLimbs<map> * limbs>([&](auto i) LOWBIT_UNROLLED {
    dot[i % 2][i / 2 / limbs][i / 2 % limbs] = sums[i % 2].joined(i / 2 / limbs, i / 2 % limbs);
  });
}
#else
// 32 inputs of both tiles, each step decoded just before its products: there are 16 registers, and GCC keeps
// arrays of decoded steps in memory.
template <int bits, Map map, bool selected, int limbs>
LOWBIT_INLINE void dot_both(const CodeTerm& t, const uint8_t* codes, const U8 (&selector)[2], const int8_t* x,
                            const int8_t* y, I32 (&dot)[2][kWeightLimbs<map>][limbs]) {
  constexpr size_t sums = kWeightLimbs<map> * limbs;
  constexpr size_t steps = kRunSteps<bits, map> < kSteps ? kRunSteps<bits, map> : kSteps;
  unroll<2>([&](auto tile) LOWBIT_UNROLLED {
    U8 v[bits];
    load_codes<bits>(codes + tile * 64 * bits, v);
    expand<kSteps / steps>([&](auto r) LOWBIT_EXPANDED {
      WideRun<bits, map> run[sums];
      unroll<sums>([&](auto i) LOWBIT_UNROLLED { run[i].begin(dot[tile][i / limbs][i % limbs]); });
      expand<steps>([&](auto i) LOWBIT_EXPANDED {
        constexpr size_t s = r * steps + i;
        U8 w[2];
        look_up<bits, map, selected>(t, selector[tile], code_step<bits, s>(v), w[0], w[1]);
        unroll<sums>([&](auto j) LOWBIT_UNROLLED {
          run[j].add(w[j / limbs], broadcast4((j % limbs ? y : x) + 4 * s));
        });
      });
      unroll<sums>([&](auto i) LOWBIT_UNROLLED { run[i].end(dot[tile][i / limbs][i % limbs]); });
    });
  });
}

template <int bits, Map map, bool selected, int limbs>
LOWBIT_INLINE void segment_dots(const CodeTerm& t, const Operands& o, const Segment& s,
                                const U8 (&selector)[2], I32 (&dot)[2][kWeightLimbs<map>][limbs]) {
  unroll<2 * kWeightLimbs<map>>([&](auto i) LOWBIT_UNROLLED {
    dot[i % 2][i / 2][0] = zero_i32();
    dot[i % 2][i / 2][limbs - 1] = set1_i32(s.start);
  });
  const uint8_t* codes = o.codes + s.k / kChunk * 2 * 64 * bits;
  for (size_t c = s.k / kChunk * kChunk; c < s.end; c += kChunk) {
    const int8_t* x = o.high + c;
    const int8_t* y = limbs == 2 ? o.low + c : x;
    // A chunk that a segment covers half of is multiplied with zeros in the other half.
    alignas(32) int8_t half[2][kChunk];
    if (c < s.k || c + kChunk > s.end) {
      const size_t from = c < s.k ? 16 : 0;
      std::memset(half, 0, sizeof half);
      std::memcpy(half[0] + from, x + from, 16);
      std::memcpy(half[1] + from, y + from, 16);
      x = half[0];
      y = half[1];
    }
    dot_both<bits, map, selected, limbs>(t, codes, selector, x, y, dot);
    fetch_ahead<2 * bits>(codes);
    codes += 2 * 64 * bits;
  }
}
#endif

template <int bits, Map map, bool selected, int limbs>
void sums_of(const CodeTerm& t, const Operands& o, const Segment* segments, size_t count, I32* out) {
  constexpr int weight_limbs = kWeightLimbs<map>;
  for (const Segment* s = segments; s < segments + count; ++s, out += 2 * weight_limbs * limbs) {
    U8 selector[2] = {};
    if constexpr (selected) {
      selector[0] = shift_left<4>(spread_rows(o.selectors + s->group * kBlockRows));
      selector[1] = shift_left<4>(spread_rows(o.selectors + s->group * kBlockRows + kTileRows));
    }
    I32 dot[2][weight_limbs][limbs];
    segment_dots<bits, map, selected, limbs>(t, o, *s, selector, dot);
    unroll<2 * weight_limbs * limbs>([&](auto i) LOWBIT_UNROLLED {
      out[i] = dot[i / (weight_limbs * limbs)][i / limbs % weight_limbs][i % limbs];
    });
  }
}

// Multipliers of a row's groups of 16 or more inputs: the sum of multiplier * sum(level * x) over them. A
// group's sums are complete when it ends or when the segment does.
template <int bits, int limbs>
LOWBIT_INLINE void multiplied_segment(const CodeTerm& t, const Operands& o, const Segment& s, I32* out) {
  I32 total[2][limbs], part[2][limbs], base[2] = {zero_i32(), zero_i32()};
  unroll<2 * limbs>(
      [&](auto i) LOWBIT_UNROLLED { total[i / limbs][i % limbs] = part[i / limbs][i % limbs] = zero_i32(); });
  const uint8_t* codes = o.codes + s.k / kChunk * 2 * 64 * bits;
  size_t k = s.k, begin = s.k;
  const auto half = [&](auto which) LOWBIT_EXPANDED {
    constexpr size_t from = which * kSteps / 2;
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      U8 w[kSteps], four[kSteps / 2];
      unpack_codes<bits>(codes + tile * 64 * bits, w);
      for (size_t i = 0; i < kSteps / 2; ++i) four[i] = w[from + i];
      unroll<limbs>([&](auto limb) LOWBIT_UNROLLED {
        part[tile][limb] = dot_chunk<bits, Map::linear>(part[tile][limb], four, (limb ? o.low : o.high) + k);
      });
    });
    k += 16;
    const size_t group = (k - 16) / t.multiplier_size;
    if (k != s.end && k % t.multiplier_size != 0) return;
    if (group < t.multiplier_groups) {  // beyond them lies padding
      const I32 pairs = load_u8_i32(o.multipliers + group * kTileRows);
      const I32 multiplier[2] = {and_(pairs, set1_i32(15)), shift_right<4>(pairs)};
      const I32 sum = set1_i32(o.sums[k / kSumStride] - o.sums[begin / kSumStride]);
      unroll<2>([&](auto tile) LOWBIT_UNROLLED {
        base[tile] = add(base[tile], mul(multiplier[tile], sum));
        unroll<limbs>([&](auto limb) LOWBIT_UNROLLED {
          total[tile][limb] = add(total[tile][limb], mul(multiplier[tile], part[tile][limb]));
          part[tile][limb] = zero_i32();
        });
      });
    }
    begin = k;
  };
  while (true) {  // a segment begins at a multiple of 64
    half(std::integral_constant<size_t, 0>());
    fetch_ahead<2 * bits>(codes);
    if (k == s.end) break;
    half(std::integral_constant<size_t, 1>());
    codes += 2 * 64 * bits;
    if (k == s.end) break;
  }
  const I32 step = set1_i32(t.step), first = set1_i32(t.base);
  unroll<2>([&](auto tile) LOWBIT_UNROLLED {
    unroll<limbs>([&](auto limb) LOWBIT_UNROLLED {
      I32 sum = t.step == 1 ? total[tile][limb] : mul(total[tile][limb], step);
      if (limb == limbs - 1) sum = add(sum, mul(base[tile], first));
      out[tile * limbs + limb] = sum;
    });
  });
}

template <int bits, int limbs>
void multiplied_sums_of(const CodeTerm& t, const Operands& o, const Segment* segments, size_t count,
                        I32* out) {
  for (size_t i = 0; i < count; ++i) multiplied_segment<bits, limbs>(t, o, segments[i], out + i * 2 * limbs);
}

template <int bits, int limbs>
SegmentSums kernel(const CodeTerm& t) {
  if constexpr (bits <= 4) {
    if (t.multipliers) return multiplied_sums_of<bits, limbs>;
    if (t.selectors && t.map == Map::table1) return sums_of<bits, Map::table1, true, limbs>;
    if (t.selectors) return sums_of<bits, Map::table2, true, limbs>;
  }
  if (t.map == Map::linear) return sums_of<bits, Map::linear, false, limbs>;
  if (t.map == Map::table1) return sums_of<bits, Map::table1, false, limbs>;
  return sums_of<bits, Map::table2, false, limbs>;
}

template <int bits>
SegmentSums kernel(const CodeTerm& t, int limbs) {
  return limbs == 2 ? kernel<bits, 2>(t) : kernel<bits, 1>(t);
}

}  // namespace

SegmentSums segment_sums(const CodeTerm& t, int limbs) {
  if (t.base3) return base3_sums(t, limbs);
  switch (t.bits) {
    case 1:
      return kernel<1>(t, limbs);
    case 2:
      return kernel<2>(t, limbs);
    case 3:
      return kernel<3>(t, limbs);
    case 4:
      return kernel<4>(t, limbs);
    case 5:
      return kernel<5>(t, limbs);
    case 6:
      return kernel<6>(t, limbs);
    case 7:
      return kernel<7>(t, limbs);
    default:
      return kernel<8>(t, limbs);
  }
}

}  // namespace lowbit::LOWBIT_ISA
