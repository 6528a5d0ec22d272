// Many tokens times one unpacked block of 32 rows. The block is unpacked to bytes once and stays in the
// first- or second-level cache; columns of activations stream past it, kGemmColumns at a time, so that a
// step costs 2 weight loads, a broadcast per column and 2 dot products per column.
#include "gemv.h"
#include "matmul_kernels.h"

namespace lowbit::LOWBIT_ISA {
namespace {

template <size_t columns, Map map, int limbs, bool small>
void product(const CodeTerm& t, size_t block, const uint8_t* panel, const Activations& a, size_t first,
             float* acc) {
  const size_t padded = a.padded;
  const int8_t* x_high = a.high + first * padded;
  const int8_t* x_low = limbs == 2 ? a.low + first * padded : nullptr;
  const size_t low_panel = padded * kBlockRows;
  size_t group = 0, group_end = t.group_size;
  for (size_t k = 0; k < padded;) {
    const size_t end = segment_end(k, t.group_size, padded);
    I32 dot[columns][2][2][2];  // [column][tile][weight limb][activation limb]
    for (auto& column : dot)
      for (auto& tile : column)
        for (auto& weight : tile)
          for (I32& sum : weight) sum = zero_i32();
    for (size_t i = k; i < end; i += 4) {
      const uint8_t* w = panel + i * kBlockRows;
      const U8 w0 = load_u8(w), w1 = load_u8(w + 64);
      U8 v0, v1;
      if constexpr (map == Map::table2) v0 = load_u8(w + low_panel), v1 = load_u8(w + low_panel + 64);
#pragma GCC unroll 6
      for (size_t c = 0; c < columns; ++c) {
        const I32 x = broadcast4(x_high + c * padded + i);
        if constexpr (small) {
          dot[c][0][0][0] = dot4_small(dot[c][0][0][0], w0, x);
          dot[c][1][0][0] = dot4_small(dot[c][1][0][0], w1, x);
        } else {
          dot[c][0][0][0] = dot4(dot[c][0][0][0], w0, x);
          dot[c][1][0][0] = dot4(dot[c][1][0][0], w1, x);
        }
        if constexpr (map == Map::table2) {
          dot[c][0][1][0] = dot4(dot[c][0][1][0], v0, x);
          dot[c][1][1][0] = dot4(dot[c][1][1][0], v1, x);
        }
        if constexpr (limbs == 2) {
          const I32 y = broadcast4(x_low + c * padded + i);
          if constexpr (small) {
            dot[c][0][0][1] = dot4_small(dot[c][0][0][1], w0, y);
            dot[c][1][0][1] = dot4_small(dot[c][1][0][1], w1, y);
          } else {
            dot[c][0][0][1] = dot4(dot[c][0][0][1], w0, y);
            dot[c][1][0][1] = dot4(dot[c][1][0][1], w1, y);
          }
          if constexpr (map == Map::table2) {
            dot[c][0][1][1] = dot4(dot[c][0][1][1], v0, y);
            dot[c][1][1][1] = dot4(dot[c][1][1][1], v1, y);
          }
        }
      }
    }
    for (size_t tile = 0; tile < 2; ++tile) {
      const TileScale w = tile_scale(t, block, group, tile);
#pragma GCC unroll 6
      for (size_t c = 0; c < columns; ++c) {
        const SegmentScale s = segment_scale(a, first + c, k, end);
        float* f = acc + c * kBlockRows + tile * kTileRows;
        store(f, add_scaled(load(f), total<map, limbs>(t, dot[c][tile], s), t, w, s));
      }
    }
    if (end == group_end) {
      ++group;
      group_end += t.group_size;
    }
    k = end;
  }
}

// Full tiles of `wide` columns, then the rest one by one.
template <size_t wide, Map map, int limbs, bool small>
void columns(const CodeTerm& t, size_t block, const uint8_t* panel, const Activations& a, size_t first,
             size_t count, float* acc) {
  while (count >= wide) {
    product<wide, map, limbs, small>(t, block, panel, a, first, acc);
    first += wide, count -= wide, acc += wide * kBlockRows;
  }
  if constexpr (wide > 1) {
    constexpr size_t narrower = wide > 4 ? 4 : wide > 2 ? 2 : 1;
    if (count) columns<narrower, map, limbs, small>(t, block, panel, a, first, count, acc);
  }
}

// Two limbs double the accumulators, so they take half the columns.
constexpr size_t kHalf = kGemmColumns > 1 ? kGemmColumns / 2 : 1;
constexpr size_t kQuarter = kHalf > 1 ? kHalf / 2 : 1;

}  // namespace

void gemm(const CodeTerm& t, size_t block, const uint8_t* panel, const Activations& a, size_t first,
          size_t count, float* acc) {
  const bool two = a.limbs == 2;
  if (t.map == Map::table2) {
    if (two) return columns<kQuarter, Map::table2, 2, false>(t, block, panel, a, first, count, acc);
    return columns<kHalf, Map::table2, 1, false>(t, block, panel, a, first, count, acc);
  }
  if (t.map == Map::linear && t.bits < 8) {
    if (two) return columns<kHalf, Map::linear, 2, true>(t, block, panel, a, first, count, acc);
    return columns<kGemmColumns, Map::linear, 1, true>(t, block, panel, a, first, count, acc);
  }
  if (two) return columns<kHalf, Map::table1, 2, false>(t, block, panel, a, first, count, acc);
  return columns<kGemmColumns, Map::table1, 1, false>(t, block, panel, a, first, count, acc);
}

}  // namespace lowbit::LOWBIT_ISA
