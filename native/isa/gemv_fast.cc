// One token times blocks of codes where bits can be placed at will (AVX-512 with GFNI): linear levels with
// int8 activations, the segment inlined, for groups of 32, of multiples of 64 and of the whole row.
#include "gemv.h"

namespace lowbit::LOWBIT_ISA {

#ifndef LOWBIT_BIT_MATRIX

Gemv fast_gemv(const CodeTerm&, int) { return nullptr; }

#else

namespace {

// Sums of one tile in one segment: for each place of placed_step(), and so many of each that a dot product
// need not wait 4 cycles for the one before it: 8 sums in the two tiles.
template <int bits>
constexpr size_t kChains = 4 / kPlaces<bits>;
template <int bits>
struct TileSums {
  I32 dot[kPlaces<bits>][kChains<bits>];
};

// 32 inputs of both tiles. Step by step, so that the tiles share each broadcast.
template <int bits>
LOWBIT_INLINE void dot_both(TileSums<bits> (&sums)[2], const uint8_t* codes, const int8_t* x) {
  U8 v[2][bits];
  load_codes<bits>(codes, v[0]);
  load_codes<bits>(codes + 64 * bits, v[1]);
  unroll<kSteps>([&](auto s) LOWBIT_UNROLLED {
    constexpr size_t chain = (bits == 3 ? s % 2 : s / kPlaces<bits>) % kChains<bits>;
    const I32 a = broadcast4(x + 4 * s);
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      I32& sum = sums[tile].dot[place_of<bits>(s)][chain];
      sum = dot4(sum, placed_step<bits, s>(v[tile]), a);
    });
  });
}

template <int bits>
LOWBIT_INLINE void begin_sums(TileSums<bits> (&sums)[2], I32 start) {
  unroll<2>([&](auto tile) LOWBIT_UNROLLED {
    unroll<4>([&](auto i)
                  LOWBIT_UNROLLED { sums[tile].dot[i / kChains<bits>][i % kChains<bits>] = zero_i32(); });
    sums[tile].dot[0][0] = start;
  });
}

template <int bits>
LOWBIT_INLINE I32 joined(const TileSums<bits>& sums) {
  I32 place[kPlaces<bits>];
  unroll<kPlaces<bits> >([&](auto p) LOWBIT_UNROLLED {
    const auto& chain = sums.dot[p];
    place[p] = chain[0];
    if constexpr (kChains<bits> == 2) place[p] = add(chain[0], chain[1]);
    if constexpr (kChains<bits> == 4) place[p] = add(add(chain[0], chain[1]), add(chain[2], chain[3]));
  });
  I32 sum = place[kPlaces<bits> - 1];
  if constexpr (kPlaces<bits> > 1) {
    expand<kPlaces<bits> - 1>([&](auto p) LOWBIT_EXPANDED {
      sum = add(place[kPlaces<bits> - 2 - p], shift_right<kPlaceShift<bits> >(sum));
    });
  }
  return sum;
}

// Scales of both tiles of one group: converted where they are used if they are fp16, as nearly all are.
template <bool halves>
struct Scales {
  const uint8_t* stored;  // fp16 [group][32], or floats
  F32 unit;
  LOWBIT_INLINE F32 of(size_t tile) const {
    if constexpr (halves)
      return mul(load_fp16(reinterpret_cast<const uint16_t*>(stored) + tile * kTileRows), unit);
    return load(reinterpret_cast<const float*>(stored) + tile * kTileRows);
  }
  static constexpr size_t kGroupBytes = kBlockRows * (halves ? 2 : 4);
};

// Sums of a segment into the run, and at its end the run into f: add_total() of decode.h with what is known
// here. A run starts from -0, so that multiplying and adding to it is multiplying alone.
template <int bits, bool weights_outer, bool halves>
LOWBIT_INLINE void end_sums(const TileSums<bits> (&sums)[2], const CodeTerm& t, const Scales<halves>& scales,
                            int32_t base, bool last, float activation, F32 (&f)[2], F32 (&run)[2]) {
  unroll<2>([&](auto tile) LOWBIT_UNROLLED {
    I32 sum = joined<bits>(sums[tile]);
    if (t.step == 2) sum = add(add(sum, sum), set1_i32(base));
    TileScale w = {};
    if (!weights_outer || last) w.scale = scales.of(tile);
    add_total<true>(f[tile], run[tile], to_f32(sum), false, last, weights_outer, t, w, {0, activation});
    if (last) run[tile] = set1(-0.0f);
  });
}

// `span` is the inputs of a segment: 64 where groups are rows or multiples of 64, or 32.
template <int bits, size_t span, bool halves>
void gemv_of(const CodeTerm& t, size_t block, size_t blocks, const Activations& a, size_t token, float* acc,
             uint8_t* scratch) {
  float* const floats = reinterpret_cast<float*>(scratch);
  int32_t* const starts = reinterpret_cast<int32_t*>(floats + t.groups * kBlockRows);
  const size_t padded = a.padded;
  const bool stepped = t.step == 2;  // sums of levels 2 apart are doubled before the base joins
  for (size_t k = 0, i = 0; k < padded; k += span, ++i)
    starts[i] = t.base * segment_scale(a, token, k, k + span < padded ? k + span : padded).sum;
  const uint8_t* codes = t.codes + block * (padded / kChunk) * 2 * 64 * bits;
  const int8_t* const x = a.high + token * padded;
  const float* const activations = a.scales + token * a.groups;
  const size_t scale_bytes = kBlockRows * (t.factors ? 1 : number_bytes(t.scale_type));
  for (const size_t last_block = block + blocks; block < last_block; ++block, acc += kBlockRows) {
    const uint8_t* const stored =
        (t.factors ? t.factors : static_cast<const uint8_t*>(t.scales)) + block * t.groups * scale_bytes;
    const uint8_t* next_scale = stored + t.groups * scale_bytes;
    Scales<halves> scales = {halves ? stored : scratch, set1(t.unit)};
    if constexpr (!halves) block_scales(t, block, floats, false);
    F32 f[2] = {load(acc), load(acc + kTileRows)}, run[2] = {set1(-0.0f), set1(-0.0f)};
    TileSums<bits> sums[2];
    const auto chunk = [&](size_t k) LOWBIT_EXPANDED {
      dot_both<bits>(sums, codes, x + k);
      fetch_ahead<2 * bits>(codes);
      codes += 2 * 64 * bits;
    };
    const auto end_group = [&]() LOWBIT_EXPANDED {
      scales.stored += Scales<halves>::kGroupBytes;
      __builtin_prefetch(next_scale, 0, 2);
      next_scale += scale_bytes;
    };
    if constexpr (span == kActivationGroup) {
      size_t group_end = t.group_size;
      for (size_t k = 0; k < padded; k += kActivationGroup) {
        const size_t end = k + kActivationGroup < padded ? k + kActivationGroup : padded;
        const int32_t base = starts[k / kActivationGroup];
        begin_sums<bits>(sums, set1_i32(stepped ? 0 : base));
        chunk(k);
        if (end > k + kChunk) chunk(k + kChunk);
        const bool last = end >= group_end;
        end_sums<bits, true>(sums, t, scales, base, last, activations[k / kActivationGroup], f, run);
        if (last) {
          end_group();
          group_end += t.group_size;
        }
      }
    } else {
      for (size_t k = 0; k < padded; k += kChunk) {
        const int32_t base = starts[k / kChunk];
        begin_sums<bits>(sums, set1_i32(stepped ? 0 : base));
        chunk(k);
        const bool last = k % kActivationGroup != 0 || k + kChunk == padded;
        end_sums<bits, false>(sums, t, scales, base, last, activations[k / kActivationGroup], f, run);
        end_group();
      }
    }
    store(acc, f[0]);
    store(acc + kTileRows, f[1]);
  }
}

template <int bits, bool halves>
Gemv kernel(const CodeTerm& t) {
  if (t.groups == 1 || t.group_size % kActivationGroup == 0) return gemv_of<bits, kActivationGroup, halves>;
  return t.group_size == kChunk ? gemv_of<bits, kChunk, halves> : nullptr;
}

template <int bits>
Gemv kernel(const CodeTerm& t) {
  return t.scale_type == Number::fp16 && !t.factors ? kernel<bits, true>(t) : kernel<bits, false>(t);
}

}  // namespace

Gemv fast_gemv(const CodeTerm& t, int limbs) {
  if (limbs != 1 || t.map != Map::linear || t.zero_points || t.offsets || t.multipliers) return nullptr;
  if (t.base3) return t.step == 1 ? base3_gemv(t) : nullptr;
  if (t.step != 1 && t.step != 2) return nullptr;  // 2: levels -1 and 1, or -3, -1, 1, 3
  switch (t.bits) {
    case 1:
      return kernel<1>(t);
    case 2:
      return kernel<2>(t);
    case 3:
      return kernel<3>(t);
    case 4:
      return kernel<4>(t);
    case 5:
      return kernel<5>(t);
    case 6:
      return kernel<6>(t);
    case 7:
      return kernel<7>(t);
    default:
      return kernel<8>(t);
  }
}

#endif

}  // namespace lowbit::LOWBIT_ISA
