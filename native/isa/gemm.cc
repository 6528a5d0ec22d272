// Many tokens times one unpacked block of 32 rows. The block is unpacked to bytes once and stays in the
// first- or second-level cache; columns of activations stream past it, kGemmColumns at a time, so that a
// step costs 2 weight loads, a broadcast per column and 2 dot products per column.
#include "gemv.h"
#include "matmul_kernels.h"

namespace lowbit::LOWBIT_ISA {
namespace {

template <bool small>
LOWBIT_INLINE I32 dot(I32 acc, U8 w, I32 x) {
  if constexpr (small) return dot4_small(acc, w, x);
  return dot4(acc, w, x);
}

template <size_t columns, Map map, int limbs, bool small, bool plain>
void product(const CodeTerm& t, size_t block, const uint8_t* panel, const Activations& a, size_t first,
             float* acc) {
  constexpr int weight_limbs = kWeightLimbs<map>;
  const size_t padded = a.padded, low_panel = padded * kBlockRows;
  const int8_t* x_high = a.high + first * padded;
  const int8_t* x_low = limbs == 2 ? a.low + first * padded : nullptr;
  const int32_t base = t.base;
  F32 run[columns][2] = {};
  const Runs runs = runs_of(t);
  // Where the last group ends: with in_features an odd multiple of 16, half a chunk before `padded`.
  const size_t stop = t.groups * t.group_size;
  size_t group = 0, group_end = t.group_size, k = 0;
  do {
    const size_t end = segment_end(k, group_end, stop);
    const bool begins = runs.first(k, group_end - t.group_size), ends = runs.last(end, group_end, stop);
    I32 sum[columns][2][weight_limbs][limbs];
    SegmentScale s[columns];
    unroll<columns>([&](auto c) LOWBIT_UNROLLED {
      s[c] = segment_scale(a, first + c, k, end);
      unroll<2 * weight_limbs>([&](auto i) LOWBIT_UNROLLED {
        sum[c][i / weight_limbs][i % weight_limbs][0] = zero_i32();
        sum[c][i / weight_limbs][i % weight_limbs][limbs - 1] =
            map == Map::linear && !plain ? zero_i32()
                                         : set1_i32((map == Map::linear ? base : -128) * s[c].sum);
      });
    });
    const uint8_t* w = panel + k * kBlockRows;
    const uint8_t* const w_end = panel + end * kBlockRows;
    const int8_t* x = x_high + k;
    const int8_t* y = x_low + (limbs == 2 ? k : 0);
    do {  // a segment is a multiple of 16 inputs; four steps a round leave the compiler few register copies
      unroll<4>([&](auto step) LOWBIT_UNROLLED {
        U8 weight[2][weight_limbs];
        unroll<2 * weight_limbs>([&](auto j) LOWBIT_UNROLLED {
          weight[j % 2][j / 2] = load_u8(w + step * 128 + j % 2 * 64 + j / 2 * low_panel);
        });
        unroll<columns>([&](auto c) LOWBIT_UNROLLED {
          unroll<limbs>([&](auto limb) LOWBIT_UNROLLED {
            const I32 v = broadcast4((limb ? y : x) + c * padded + 4 * step);
            unroll<2 * weight_limbs>([&](auto j) LOWBIT_UNROLLED {
              I32& target = sum[c][j % 2][j / 2][limb];
              target = dot<small>(target, weight[j % 2][j / 2], v);
            });
          });
        });
      });
      w += 4 * 128;
      x += 16;
      if constexpr (limbs == 2) y += 16;
    } while (w != w_end);
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      const TileScale scale = tile_scale<plain>(t, block, group, tile);
      unroll<columns>([&](auto c) LOWBIT_UNROLLED {
        float* const at = acc + c * kBlockRows + tile * kTileRows;
        const F32 total = segment_total<map, plain>(sum[c][tile], t, scale, s[c]);
        F32 f = load(at);
        add_total<plain>(f, run[c][tile], total, begins, ends, runs.weights_outer, t, scale, s[c]);
        store(at, f);
      });
    });
    if (end == group_end) {
      ++group;
      group_end += t.group_size;
    }
    k = end;
  } while (k < stop);
}

// Full tiles of `wide` columns, then narrower ones.
template <size_t wide, Map map, int limbs, bool small, bool plain>
void columns(const CodeTerm& t, size_t block, const uint8_t* panel, const Activations& a, size_t first,
             size_t count, float* acc) {
  while (count >= wide) {
    product<wide, map, limbs, small, plain>(t, block, panel, a, first, acc);
    first += wide, count -= wide, acc += wide * kBlockRows;
  }
  if constexpr (wide > 1) {
    constexpr size_t narrower = wide > 4 ? 4 : wide > 2 ? 2 : 1;
    if (count) columns<narrower, map, limbs, small, plain>(t, block, panel, a, first, count, acc);
  }
}

// Two limbs double the accumulators, so they take half the columns.
constexpr size_t kHalf = kGemmColumns > 1 ? kGemmColumns / 2 : 1;
constexpr size_t kQuarter = kHalf > 1 ? kHalf / 2 : 1;

template <Map map, bool small>
void product_any(const CodeTerm& t, size_t block, const uint8_t* panel, const Activations& a, size_t first,
                 size_t count, float* acc) {
  constexpr size_t one = map == Map::table2 ? kHalf : kGemmColumns;
  constexpr size_t two = map == Map::table2 ? kQuarter : kHalf;
  if (is_plain(t)) {
    if (a.limbs == 2) return columns<two, map, 2, small, true>(t, block, panel, a, first, count, acc);
    return columns<one, map, 1, small, true>(t, block, panel, a, first, count, acc);
  }
  if (a.limbs == 2) return columns<two, map, 2, small, false>(t, block, panel, a, first, count, acc);
  return columns<one, map, 1, small, false>(t, block, panel, a, first, count, acc);
}

}  // namespace

void gemm(const CodeTerm& t, size_t block, const uint8_t* panel, const Activations& a, size_t first,
          size_t count, float* acc) {
  if (t.map == Map::table2) return product_any<Map::table2, false>(t, block, panel, a, first, count, acc);
  if (t.map == Map::table1 || t.multipliers)  // products of levels and multipliers, plus 128
    return product_any<Map::table1, false>(t, block, panel, a, first, count, acc);
  if (t.bits == 8) return product_any<Map::linear, false>(t, block, panel, a, first, count, acc);
  return product_any<Map::linear, true>(t, block, panel, a, first, count, acc);
}

}  // namespace lowbit::LOWBIT_ISA
