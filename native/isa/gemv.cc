// One token times a block of codes, decoded in registers: decode is bound by memory, so nothing is
// written back between the packed weights and the sums.
#include "gemv.h"

namespace lowbit::LOWBIT_ISA {
namespace {

// Bytes that the stream of codes is fetched ahead of its use: the hardware's own prefetch stops at each page.
constexpr size_t kAhead = 4096;
LOWBIT_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 3); }

template <int bits, Map map, bool selected>
LOWBIT_INLINE void tile_bytes(const CodeTerm& t, const uint8_t* p, U8 selector, U8 (&high)[kSteps],
                              U8 (&low)[kSteps]) {
  unpack_codes<bits>(p, high);
  if constexpr (map != Map::linear) {
    for (size_t s = 0; s < kSteps; ++s) {
      if constexpr (selected) {
        high[s] = or_(high[s], selector);
        if constexpr (map == Map::table2) low[s] = lookup64(t.low, high[s]);
        high[s] = lookup64(t.high, high[s]);
      } else {
        if constexpr (map == Map::table2) low[s] = lookup<bits>(t.low, high[s]);
        high[s] = lookup<bits>(t.high, high[s]);
      }
    }
  }
}

template <int bits, Map map, bool selected, int limbs, bool plain>
void gemv(const CodeTerm& t, size_t block, const Activations& a, size_t token, float* acc) {
  constexpr int weight_limbs = kWeightLimbs<map>;
  const size_t padded = a.padded;
  const uint8_t* codes = t.codes + block * (padded / kChunk) * 2 * 64 * bits;
  const int8_t* x_high = a.high + token * padded;
  const int8_t* x_low = limbs == 2 ? a.low + token * padded : nullptr;
  F32 f[2] = {load(acc), load(acc + kTileRows)}, run[2] = {};
  const Runs runs = runs_of(t);
  size_t group = 0, group_end = t.group_size;
  for (size_t k = 0; k < padded;) {
    const size_t end = segment_end(k, group_end, padded);
    const SegmentScale s = segment_scale(a, token, k, end);
    const bool first = runs.first(k, group_end - t.group_size), last = runs.last(end, group_end, padded);
    I32 dot[2][weight_limbs][limbs];
    U8 selector[2] = {};
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      unroll<weight_limbs>([&](auto w) LOWBIT_UNROLLED {
        dot[tile][w][0] = zero_i32();
        dot[tile][w][limbs - 1] = start<bits, map, plain>(t.base, s);
      });
      if constexpr (selected)
        selector[tile] = shift_left<4>(
            spread_rows(t.selectors + (block * t.groups + group) * kBlockRows + tile * kTileRows));
    });
    for (size_t c = k; c < end; c += kChunk) {
      unroll<2>([&](auto tile) LOWBIT_UNROLLED {
        U8 high[kSteps], low[kSteps];
        tile_bytes<bits, map, selected>(t, codes, selector[tile], high, low);
        for (size_t line = 0; line < static_cast<size_t>(bits); ++line) prefetch(codes + kAhead + 64 * line);
        codes += 64 * bits;
        unroll<limbs>([&](auto limb) LOWBIT_UNROLLED {
          const int8_t* x = (limb ? x_low : x_high) + c;
          dot[tile][0][limb] = dot_chunk<bits, map>(dot[tile][0][limb], high, x);
          if constexpr (weight_limbs == 2)
            dot[tile][1][limb] = dot_chunk<bits, map>(dot[tile][1][limb], low, x);
        });
      });
    }
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      const TileScale w = tile_scale<plain>(t, block, group, tile);
      add_total<plain>(f[tile], run[tile], segment_total<map, plain>(dot[tile], t, w, s), first, last,
                       runs.weights_outer, t, w, s);
    });
    if (end == group_end) {
      ++group;
      group_end += t.group_size;
    }
    k = end;
  }
  store(acc, f[0]);
  store(acc + kTileRows, f[1]);
}

// Tables with zero points or offsets are rare, and one-token products wait for memory anyway, so tables have
// no separate kernel for plain terms.
template <int bits, Map map, bool selected>
CodeKernels kernels_of(bool plain, int limbs) {
  constexpr bool separate = map == Map::linear;
  if (plain && separate)
    return {limbs == 2 ? gemv<bits, map, selected, 2, separate> : gemv<bits, map, selected, 1, separate>};
  return {limbs == 2 ? gemv<bits, map, selected, 2, false> : gemv<bits, map, selected, 1, false>};
}

template <int bits>
CodeKernels kernels_of(const CodeTerm& t, int limbs) {
  const bool plain = is_plain(t);
  if (t.map == Map::linear) return kernels_of<bits, Map::linear, false>(plain, limbs);
  if constexpr (bits <= 4) {
    if (t.selectors && t.map == Map::table1) return kernels_of<bits, Map::table1, true>(plain, limbs);
    if (t.selectors) return kernels_of<bits, Map::table2, true>(plain, limbs);
  }
  if (t.map == Map::table1) return kernels_of<bits, Map::table1, false>(plain, limbs);
  return kernels_of<bits, Map::table2, false>(plain, limbs);
}

}  // namespace

CodeKernels code_kernels(const CodeTerm& t, int limbs) {
  switch (t.bits) {
    case 1:
      return kernels_of<1>(t, limbs);
    case 2:
      return kernels_of<2>(t, limbs);
    case 3:
      return kernels_of<3>(t, limbs);
    case 4:
      return kernels_of<4>(t, limbs);
    case 5:
      return kernels_of<5>(t, limbs);
    case 6:
      return kernels_of<6>(t, limbs);
    case 7:
      return kernels_of<7>(t, limbs);
    default:
      return kernels_of<8>(t, limbs);
  }
}

}  // namespace lowbit::LOWBIT_ISA
