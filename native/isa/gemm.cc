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
  const size_t padded = a.padded;
  const int8_t* x_high = a.high + first * padded;
  const int8_t* x_low = limbs == 2 ? a.low + first * padded : nullptr;
  const size_t low_panel = padded * kBlockRows;
  size_t group = 0, group_end = t.group_size;
  for (size_t k = 0; k < padded;) {
    const size_t end = segment_end(k, group_end, padded);
    I32 sum[columns][2][weight_limbs][limbs];
    SegmentScale s[columns];
    unroll<columns>([&](auto c) LOWBIT_UNROLLED {
      s[c] = segment_scale(a, first + c, k, end);
      unroll<2 * weight_limbs>([&](auto i) LOWBIT_UNROLLED {
        sum[c][i / weight_limbs][i % weight_limbs][0] = zero_i32();
        sum[c][i / weight_limbs][i % weight_limbs][limbs - 1] = start<map, plain>(t, s[c]);
      });
    });
    for (size_t i = k; i < end; i += 4) {
      U8 w[2][weight_limbs];
      unroll<2 * weight_limbs>([&](auto j) LOWBIT_UNROLLED {
        w[j % 2][j / 2] = load_u8(panel + i * kBlockRows + j % 2 * 64 + j / 2 * low_panel);
      });
      unroll<columns>([&](auto c) LOWBIT_UNROLLED {
        unroll<limbs>([&](auto limb) LOWBIT_UNROLLED {
          const I32 x = broadcast4((limb ? x_low : x_high) + c * padded + i);
          unroll<2 * weight_limbs>([&](auto j) LOWBIT_UNROLLED {
            I32& target = sum[c][j % 2][j / 2][limb];
            target = dot<small>(target, w[j % 2][j / 2], x);
          });
        });
      });
    }
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      const TileScale w = tile_scale<plain>(t, block, group, tile);
      unroll<columns>([&](auto c) LOWBIT_UNROLLED {
        float* f = acc + c * kBlockRows + tile * kTileRows;
        store(f, add_scaled<map, plain>(load(f), sum[c][tile], t, w, s[c]));
      });
    });
    if (end == group_end) {
      ++group;
      group_end += t.group_size;
    }
    k = end;
  }
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
  if (t.map == Map::table1) return product_any<Map::table1, false>(t, block, panel, a, first, count, acc);
  if (t.bits == 8) return product_any<Map::linear, false>(t, block, panel, a, first, count, acc);
  return product_any<Map::linear, true>(t, block, panel, a, first, count, acc);
}

}  // namespace lowbit::LOWBIT_ISA
