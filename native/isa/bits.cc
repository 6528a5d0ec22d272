// Many tokens times codes of one bit, by lookups of sums instead of products. A dot product multiplies 64
// bits with 64 activations; two lookups, of the low and the high part of a sum, add up 256 of them
// (bit_tables.h), once somebody has made the tables, which 16 rows or 16,000 share. The integers are the
// same.
#include "decode.h"
#include "bit_products.h"
#include "simd/bit_tables.h"

namespace lowbit::LOWBIT_ISA {

BitKernels make_bit_kernels();

#ifndef LOWBIT_BIT_TABLES

BitKernels make_bit_kernels() { return {nullptr, nullptr}; }

#else

namespace {

constexpr size_t kHalves = kActivationGroup / kSumStride;  // tables of a segment
constexpr int kHighZero = 16, kHighUnit = 32;              // of a table's high bytes, see bit_tables.h

void make_table(const CodeTerm& t, const Activations& a, size_t token, size_t k, size_t end,
                BitTable* table) {
  const int8_t* const x = a.high + token * a.padded + k;
  for (size_t i = 0; i < (end - k) / kSumStride; ++i) {
    const BitTables both = bit_tables(x + i * kSumStride);
    store_u8(table->low[i], both.low);
    store_u8(table->high[i], both.high);
  }
  // Each row adds up 4 lookups for each of the 4 inputs of a step.
  constexpr int32_t zeros = -kHighZero * kHighUnit * 4 * static_cast<int32_t>(kHalves);
  for (size_t i = 0; i < (end - k) / kActivationGroup; ++i) {
    const size_t at = k + i * kActivationGroup;
    const SegmentScale s = segment_scale(a, token, at, at + kActivationGroup);
    table->starts[i] = t.base * s.sum + t.step * zeros;
    table->scales[i] = s.activation;
  }
}

template <size_t columns>
struct ByteSums {
  U8 low[columns][2], high[columns][2];
};

// 16 inputs of both tiles: looked up for each token, and added unless they are the `first` of a segment.
template <bool first, size_t columns>
LOWBIT_INLINE void add_half(ByteSums<columns>& sums, const U8 (&index)[2], const BitTable* tables,
                            size_t at) {
  unroll<columns>([&](auto c) LOWBIT_UNROLLED {
    const U8 low = load_once(tables[c].low[at]), high = load_once(tables[c].high[at]);
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      const U8 l = find(low, index[tile]), h = find(high, index[tile]);
      sums.low[c][tile] = first ? l : add_in_order(sums.low[c][tile], l);
      sums.high[c][tile] = first ? h : add_in_order(sums.high[c][tile], h);
    });
  });
}

// `single`: groups of 64, each segment a run of its own (decode.h, Runs); else groups of several segments.
template <size_t columns, bool single>
void tile(const CodeTerm& t, size_t block, size_t chunks, size_t k, size_t end, const BitTable* tables,
          float* acc) {
  const uint8_t* codes = t.codes + (block * chunks + k / kChunk) * 2 * 64;
  alignas(64) int32_t units[2][kTileRows];  // what a byte of the low, of the high sums counts, in each byte
  store_i32(units[0], set1_i32(0x01010101 * t.step));
  store_i32(units[1], set1_i32(0x01010101 * kHighUnit * t.step));
  F32 f[columns][2], run[columns][2];
  unroll<2 * columns>(
      [&](auto i) LOWBIT_UNROLLED { f[i / 2][i % 2] = load(acc + i / 2 * kBlockRows + i % 2 * kTileRows); });
  size_t group = k / t.group_size, left = t.group_size / kActivationGroup;  // segments of the group
  for (size_t segment = 0; segment < (end - k) / kActivationGroup; ++segment) {
    ByteSums<columns> sums;
    unroll<kHalves / 2>([&](auto chunk) LOWBIT_UNROLLED {
      const size_t at = segment * kHalves + 2 * chunk;
      const U8 v[2] = {load_once(codes), load_once(codes + 64)};
      const U8 low[2] = {bit_indices(v[0]), bit_indices(v[1])};
      add_half<chunk == 0>(sums, low, tables, at);
      const U8 high[2] = {bit_indices(shift_right_loose<4>(v[0])), bit_indices(shift_right_loose<4>(v[1]))};
      add_half<false>(sums, high, tables, at + 1);
      __builtin_prefetch(codes + chunks * 2 * 64, 0,
                         2);  // the next block's, which lie too far off for a stream
      __builtin_prefetch(codes + chunks * 2 * 64 + 64, 0, 2);
      codes += 2 * 64;
    });
    const bool begins = left == t.group_size / kActivationGroup, ends = --left == 0;
    TileScale w[2] = {};
    if (single || ends) {
      const size_t next = ((block + 1) * t.groups + group) * kBlockRows * number_bytes(t.scale_type);
      __builtin_prefetch(static_cast<const uint8_t*>(t.scales) + next, 0, 2);
      w[0] = tile_scale<true>(t, block, group, 0);
      w[1] = tile_scale<true>(t, block, group, 1);
      ++group;
      left = t.group_size / kActivationGroup;
    }
    unroll<columns>([&](auto c) LOWBIT_UNROLLED {
      const I32 start = set1_i32(tables[c].starts[segment]);
      const F32 activation = set1(tables[c].scales[segment]);
      unroll<2>([&](auto i) LOWBIT_UNROLLED {
        const I32 low = dot4(start, sums.low[c][i], load_i32(units[0]));
        const F32 total = to_f32(dot4(low, sums.high[c][i], load_i32(units[1])));
        if constexpr (single) {
          f[c][i] = fma(mul(total, activation), w[i].scale, f[c][i]);
        } else {
          run[c][i] = begins ? mul(total, activation) : fma(total, activation, run[c][i]);
          if (ends) f[c][i] = fma(run[c][i], w[i].scale, f[c][i]);
        }
      });
    });
  }
  unroll<2 * columns>(
      [&](auto i) LOWBIT_UNROLLED { store(acc + i / 2 * kBlockRows + i % 2 * kTileRows, f[i / 2][i % 2]); });
}

template <bool single>
void multiply(const CodeTerm& t, size_t block, size_t chunks, size_t k, size_t end, const BitTable* tables,
              size_t count, float* acc) {
  constexpr decltype(&tile<1, single>) tiles[] = {tile<1, single>, tile<2, single>, tile<3, single>,
                                                  tile<4, single>};
  static_assert(sizeof tiles / sizeof *tiles == kBitTokens, "a tile for each width");
  tiles[count - 1](t, block, chunks, k, end, tables, acc);
}

void multiply_any(const CodeTerm& t, size_t block, size_t chunks, size_t k, size_t end,
                  const BitTable* tables, size_t count, float* acc) {
  (t.group_size == kActivationGroup ? multiply<true> : multiply<false>)(t, block, chunks, k, end, tables,
                                                                        count, acc);
}

}  // namespace

BitKernels make_bit_kernels() { return {make_table, multiply_any}; }

#endif

}  // namespace lowbit::LOWBIT_ISA
