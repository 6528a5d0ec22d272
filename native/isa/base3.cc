// Sums of one segment of base-3 codes (docs/formats.md): five ternary codes in a byte, of five consecutive
// steps. The low six bits of a byte below 192 look up four codes at once as fields of two bits, its top two
// bits are the fifth; the 51 bytes from 192 on look up all five.
#include <algorithm>
#include <cstring>

#include "few.h"
#include "gemv.h"

namespace lowbit::LOWBIT_ISA {
namespace {

struct Base3Tables {
  alignas(64) uint8_t four[64], four_from_192[64], fifth_from_192[64];
};
constexpr Base3Tables make_tables() {
  Base3Tables tables = {};
  const auto fields = [](Trits t) {
    return static_cast<uint8_t>(t.codes[0] | t.codes[1] << 2 | t.codes[2] << 4 | t.codes[3] << 6);
  };
  for (int i = 0; i < 64; ++i) {
    const Trits special = trits_of(static_cast<uint8_t>(192 + i));
    tables.four[i] = fields(trits_of(static_cast<uint8_t>(i)));
    tables.four_from_192[i] = fields(special);
    tables.fifth_from_192[i] = static_cast<uint8_t>(special.codes[4] << 6);
  }
  return tables;
}
constexpr Base3Tables kTables = make_tables();

constexpr size_t kVectorBytes = 2 * 64;               // of both tiles
constexpr size_t kGroupSteps = kActivationGroup / 4;  // 16 steps of a segment
constexpr size_t kRound = kGroupSteps;                // 16 vectors hold 5 such groups
constexpr size_t kTouched = 4;                        // vectors that one group touches

// The codes of one vector: four in fields of two bits, the fifth in the top two bits of another byte.
struct Fields {
  U8 four, fifth;
};

LOWBIT_INLINE Fields decode(U8 v) {
#ifdef LOWBIT_BIT_MATRIX
  return {lookup64_from_192(lookup64(kTables.four, v), kTables.four_from_192, v),
          lookup64_from_192(and_(v, set1_u8(0xc0)), kTables.fifth_from_192, v)};
#else
  alignas(16) constexpr uint8_t kFrom192[16] = {0, 0xff};
  const U8 special = lookup16(kFrom192, and_(shift_right<7>(v), shift_right<6>(v)));
  const U8 i = and_(v, set1_u8(63)), top = and_(v, set1_u8(0xc0));
  const auto choose = [&](U8 a, U8 b) LOWBIT_EXPANDED { return xor_(a, and_(xor_(a, b), special)); };
  return {choose(lookup64(kTables.four, i), lookup64(kTables.four_from_192, i)),
          choose(top, lookup64(kTables.fifth_from_192, i))};
#endif
}

template <size_t place>
LOWBIT_INLINE U8 code_of(const Fields& f) {
  if constexpr (place == 4) return shift_right<6>(f.fifth);
  return and_(shift_right<2 * place>(f.four), set1_u8(3));
}

#ifdef LOWBIT_BIT_MATRIX
// Codes of linear levels stay where they are, times 4^place, with a sum for each of the four powers.
template <int limbs>
struct Powers {
  I32 dot[2][limbs][4];
};

LOWBIT_INLINE I32 joined(const I32 (&dot)[4]) {
  return add(dot[0], shift_right<2>(add(dot[1], shift_right<2>(add(dot[2], shift_right<2>(dot[3]))))));
}

// Segment `g` of the five that begin at `codes`; both tiles of a step share the activations.
template <int limbs, size_t g>
LOWBIT_INLINE void linear_group(const uint8_t* codes, const int8_t* x, const int8_t* y, int32_t start,
                                I32* out) {
  Powers<limbs> sums;
  unroll<2 * limbs * 4>([&](auto i)
                            LOWBIT_UNROLLED { sums.dot[i / 4 / limbs][i / 4 % limbs][i % 4] = zero_i32(); });
  unroll<2>([&](auto tile) LOWBIT_UNROLLED { sums.dot[tile][limbs - 1][0] = set1_i32(start); });
  Fields fields[2];
  expand<kGroupSteps>([&](auto i) LOWBIT_EXPANDED {
    constexpr size_t step = kGroupSteps * g + i, place = step % kTritSteps, power = place < 4 ? place : 3;
    const uint8_t* p = codes + step / kTritSteps * kVectorBytes;
    if constexpr (i == 0 || place == 0) {
      fields[0] = decode(load_once(p));
      fields[1] = decode(load_once(p + 64));
      fetch_ahead<2>(p);
    }
    const I32 a = broadcast4(x + 4 * i);
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      U8 w = fields[tile].fifth;
      if constexpr (place < 4) w = and_(fields[tile].four, set1_u8(3 << (2 * place)));
      auto& dot = sums.dot[tile];
      dot[0][power] = dot4(dot[0][power], w, a);
      if constexpr (limbs == 2) dot[1][power] = dot4(dot[1][power], w, broadcast4(y + 4 * i));
    });
  });
  unroll<2 * limbs>([&](auto i) LOWBIT_UNROLLED { out[i] = joined(sums.dot[i / limbs][i % limbs]); });
}
#endif

#ifdef LOWBIT_BIT_MATRIX
// One token times blocks of linear levels, with int8 activations and groups that are rows or multiples of 64:
// five segments, the steps of 16 vectors, at a time, so that every vector is decoded once and sums go to
// their floats in registers. What remains of a row goes segment by segment.
template <typename Tail>
LOWBIT_INLINE void rounds_of(const CodeTerm& t, size_t block, size_t blocks, const Activations& a,
                             size_t token, float* acc, uint8_t* scratch, Tail tail) {
  float* const scales = reinterpret_cast<float*>(scratch);
  int32_t* const starts = reinterpret_cast<int32_t*>(scales + t.groups * kBlockRows);
  const size_t padded = a.padded, whole = padded / (kTritSteps * kActivationGroup);
  const int8_t* const high = a.high + token * padded;
  const float* const activations = a.scales + token * a.groups;
  for (size_t i = 0; i < a.groups; ++i) {
    const size_t k = i * kActivationGroup;
    starts[i] = t.base * segment_scale(a, token, k, std::min(k + kActivationGroup, padded)).sum;
  }
  for (const size_t last_block = block + blocks; block < last_block; ++block, acc += kBlockRows) {
    block_scales(t, block, scales);
    const uint8_t* const first = t.codes + block * t.vectors * kVectorBytes;
    const float* scale = scales;
    size_t group_end = t.group_size;
    F32 f[2] = {load(acc), load(acc + kTileRows)}, run[2] = {set1(-0.0f), set1(-0.0f)};
    const auto finish = [&](size_t segment, const I32(&sums)[2]) LOWBIT_EXPANDED {
      const F32 activation = set1(activations[segment]);
      unroll<2>([&](auto tile)
                    LOWBIT_UNROLLED { run[tile] = fma(to_f32(sums[tile]), activation, run[tile]); });
      const size_t end = (segment + 1) * kActivationGroup;
      if (end < group_end && end < padded) return;
      unroll<2>([&](auto tile) LOWBIT_UNROLLED {
        f[tile] = fma(run[tile], load(scale + tile * kTileRows), f[tile]);
        run[tile] = set1(-0.0f);
      });
      scale += kBlockRows;
      group_end += t.group_size;
    };
    for (size_t r = 0; r < whole; ++r) {
      const uint8_t* const codes = first + r * kRound * kVectorBytes;
      const int8_t* const x = high + r * kTritSteps * kActivationGroup;
      Fields fields[2];
      I32 dot[2][4];
      expand<kTritSteps * kGroupSteps>([&](auto step) LOWBIT_EXPANDED {
        constexpr size_t place = step % kTritSteps, power = place < 4 ? place : 3;
        const size_t segment = r * kTritSteps + step / kGroupSteps;
        if constexpr (step % kGroupSteps == 0)
          unroll<2>([&](auto tile) LOWBIT_UNROLLED {
            dot[tile][0] = set1_i32(starts[segment]);
            dot[tile][1] = dot[tile][2] = dot[tile][3] = zero_i32();
          });
        if constexpr (place == 0) {
          const uint8_t* const p = codes + step / kTritSteps * kVectorBytes;
          fields[0] = decode(load_once(p));
          fields[1] = decode(load_once(p + 64));
          fetch_ahead<2>(p);
        }
        const I32 v = broadcast4(x + 4 * step);
        unroll<2>([&](auto tile) LOWBIT_UNROLLED {
          U8 w = fields[tile].fifth;
          if constexpr (place < 4) w = and_(fields[tile].four, set1_u8(3 << (2 * place)));
          dot[tile][power] = dot4(dot[tile][power], w, v);
        });
        if constexpr (step % kGroupSteps == kGroupSteps - 1) {
          I32 sums[2];
          unroll<2>([&](auto tile) LOWBIT_UNROLLED { sums[tile] = joined(dot[tile]); });
          finish(segment, sums);
        }
      });
    }
    for (size_t segment = whole * kTritSteps; segment < a.groups; ++segment) {
      const size_t k = segment * kActivationGroup;
      Operands o = {};
      o.codes = first;
      o.high = high;
      const Segment s = {k, std::min(k + kActivationGroup, padded), 0, starts[segment], false, {}};
      I32 sums[2];
      tail(o, s, sums);
      finish(segment, sums);
    }
    store(acc, f[0]);
    store(acc + kTileRows, f[1]);
  }
}
#endif

template <Map map, int limbs>
void any_group(const CodeTerm& t, const uint8_t* codes, size_t g, const int8_t* x, const int8_t* y,
               int32_t start, I32* out) {
  constexpr int weight_limbs = kWeightLimbs<map>;
  const size_t first = kGroupSteps * g / kTritSteps, skip = kGroupSteps * g % kTritSteps;
  for (size_t tile = 0; tile < 2; ++tile) {
    U8 all[kTouched * kTritSteps];
    for (size_t v = 0; v < kTouched; ++v) {
      const Fields f = decode(load_u8(codes + (first + v) * kVectorBytes + tile * 64));
      expand<kTritSteps>([&](auto place)
                             LOWBIT_EXPANDED { all[v * kTritSteps + place] = code_of<place>(f); });
    }
    U8 high[kGroupSteps], low[kGroupSteps];
    for (size_t s = 0; s < kGroupSteps; ++s) {
      high[s] = all[skip + s];
      if constexpr (map == Map::table2) low[s] = lookup16(t.low, high[s]);
      if constexpr (map != Map::linear) high[s] = lookup16(t.high, high[s]);
    }
    for (int limb = 0; limb < limbs; ++limb) {
      const I32 begin = limb == limbs - 1 ? set1_i32(start) : zero_i32();
      I32* sums = out + tile * weight_limbs * limbs + limb;
      sums[0] = dot_chunk<2, map>(begin, high, limb ? y : x);
      if constexpr (map == Map::table2) sums[limbs] = dot_chunk<2, map>(begin, low, limb ? y : x);
    }
  }
}

// A segment whose inputs or vectors end early goes on with zeros.
struct Cut {
  alignas(64) uint8_t codes[kRound * kVectorBytes];
  alignas(64) int8_t inputs[2][kActivationGroup];
};

template <Map map, int limbs>
void sums_of(const CodeTerm& t, const Operands& o, const Segment* segments, size_t count, I32* out) {
  for (const Segment* s = segments; s < segments + count; ++s, out += 2 * kWeightLimbs<map> * limbs) {
    const size_t group = s->k / kActivationGroup, g = group % kTritSteps;
    const size_t round = group / kTritSteps * kRound, first = round + kGroupSteps * g / kTritSteps;
    const uint8_t* codes = o.codes + round * kVectorBytes;
    const int8_t* x = o.high + s->k;
    const int8_t* y = limbs == 2 ? o.low + s->k : x;
    Cut cut;
    if (s->end - s->k < kActivationGroup || first + kTouched > t.vectors) {
      const size_t vectors = first < t.vectors ? std::min(kTouched, t.vectors - first) : 0;
      uint8_t* to = cut.codes + (first - round) * kVectorBytes;
      std::memset(to, 0, kTouched * kVectorBytes);
      std::memcpy(to, codes + (first - round) * kVectorBytes, vectors * kVectorBytes);
      std::memset(cut.inputs, 0, sizeof cut.inputs);
      std::memcpy(cut.inputs[0], x, s->end - s->k);
      std::memcpy(cut.inputs[1], y, s->end - s->k);
      codes = cut.codes;
      x = cut.inputs[0];
      y = cut.inputs[1];
    }
#ifdef LOWBIT_BIT_MATRIX
    if constexpr (map == Map::linear) {
      switch (g) {
        case 0:
          linear_group<limbs, 0>(codes, x, y, s->start, out);
          break;
        case 1:
          linear_group<limbs, 1>(codes, x, y, s->start, out);
          break;
        case 2:
          linear_group<limbs, 2>(codes, x, y, s->start, out);
          break;
        case 3:
          linear_group<limbs, 3>(codes, x, y, s->start, out);
          break;
        default:
          linear_group<limbs, 4>(codes, x, y, s->start, out);
      }
      continue;
    }
#endif
    any_group<map, limbs>(t, codes, g, x, y, s->start, out);
  }
}

#ifdef LOWBIT_BIT_MATRIX
void fast(const CodeTerm& t, size_t block, size_t blocks, const Activations& a, size_t token, float* acc,
          uint8_t* scratch) {
  rounds_of(t, block, blocks, a, token, acc, scratch, [&](const Operands& o, const Segment& s, I32* sums) {
    sums_of<Map::linear, 1>(t, o, &s, 1, sums);
  });
}
#endif

template <Map map>
SegmentSums kernel(int limbs) {
  return limbs == 2 ? sums_of<map, 2> : sums_of<map, 1>;
}

}  // namespace

// Four vectors of five codes become five of four: fields of two bits in the same order of steps.
void base3_planes(const CodeTerm& t, const uint8_t* codes, size_t chunks, uint8_t* planes) {
  for (size_t tile = 0; tile < 2; ++tile)
    for (size_t v = 0, to = 0; to < 2 * chunks; v += 4, to += 5) {
      Fields f[4];
      for (size_t i = 0; i < 4; ++i) {
        if (v + i < t.vectors) {
          const uint8_t* const at = codes + (v + i) * kVectorBytes + tile * 64;
          f[i] = decode(load_u8(at));
        } else {
          f[i] = {set1_u8(0), set1_u8(0)};
        }
      }
      const auto next = [](U8 a) LOWBIT_EXPANDED { return shift_right<6>(a); };
      const U8 out[5] = {
          f[0].four,
          or_(next(f[0].fifth), shift_left<2>(f[1].four)),
          or_(or_(next(f[1].four), shift_left<2>(next(f[1].fifth))), shift_left<4>(f[2].four)),
          or_(or_(shift_right<4>(f[2].four), shift_left<4>(next(f[2].fifth))), shift_left<6>(f[3].four)),
          or_(shift_right<2>(f[3].four), f[3].fifth),
      };
      for (size_t i = 0; i < 5 && to + i < 2 * chunks; ++i)
        store_u8(planes + ((to + i) / 2 * 4 + tile * 2 + (to + i) % 2) * 64, out[i]);
    }
}

#ifdef LOWBIT_BIT_MATRIX
Gemv base3_gemv(const CodeTerm& t) {
  return t.groups == 1 || t.group_size % kActivationGroup == 0 ? fast : nullptr;
}
#endif

SegmentSums base3_sums(const CodeTerm& t, int limbs) {
  if (t.map == Map::table1) return kernel<Map::table1>(limbs);
  if (t.map == Map::table2) return kernel<Map::table2>(limbs);
  return kernel<Map::linear>(limbs);
}

}  // namespace lowbit::LOWBIT_ISA
