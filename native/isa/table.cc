// Sums of one segment of 1- to 3-bit codes by table lookup (arXiv:2407.00088 and 2206.09557 describe the
// idea): four bits of a plane pick one of 16 precomputed sums of activations.
//
// The stored order gives the index for nothing. In a plane of one bit, a nibble of byte 4 * row + j is that
// row's bits for input j of four steps; in a plane of two bits it is two codes, for input j of two steps.
// Either way a nibble n adds the y_b with bit b of n set, where y are four activations, or two and their
// doubles: n's entry is their sum, which is exact.
//
// Entries less their table's smallest lie in 0 .. 762 and are stored as 32 * high + low. Low parts are below
// 32, high parts below 24, so bytes hold the sums of eight lookups of each: two lookups and two additions of
// bytes serve 32 rows x 4 bits, and widening is rare. Nothing is rounded: the sums equal those of
// segments.cc.
#include "table.h"

#include "matmul_kernels.h"
#include "simd/lookups.h"

namespace lowbit::LOWBIT_ISA {
namespace {

// One table of 16 entries; y are the four numbers that a nibble selects from. Returns the smallest entry.
LOWBIT_INLINE int build_table(const int16_t (&y)[4], uint8_t* low, uint8_t* high) {
  constexpr int16_t kBits[4][16] = {{0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1},
                                    {0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1},
                                    {0, 0, 0, 0, -1, -1, -1, -1, 0, 0, 0, 0, -1, -1, -1, -1},
                                    {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1}};
  int lowest = 0;
  for (int16_t v : y) lowest += v < 0 ? v : 0;
  for (int n = 0; n < 16; ++n) {
    const int sum = (kBits[0][n] & y[0]) + (kBits[1][n] & y[1]) + (kBits[2][n] & y[2]) + (kBits[3][n] & y[3]);
    const uint16_t entry = static_cast<uint16_t>(sum - lowest);
    low[n] = entry & 31;
    high[n] = static_cast<uint8_t>(entry >> 5);
  }
  return lowest;
}

template <size_t width>
void build_limb(const int8_t* x, size_t chunks, uint8_t* out) {
  int32_t* lowest = reinterpret_cast<int32_t*>(out);
  uint8_t* table = out + lowest_bytes(chunks);
  for (size_t c = 0; c < chunks; ++c, x += kChunk) {
    lowest[c] = 0;
    for (size_t nibble = 0; nibble < 2 * width; ++nibble, table += kNibbleTableBytes)
      for (size_t j = 0; j < 4; ++j) {
        const int8_t* p = x + nibble * (4 / width) * 4 + j;  // of the nibble's first step
        int16_t y[4];
        for (size_t b = 0; b < 4; ++b) y[b] = static_cast<int16_t>(p[b / width * 4] * (b % width + 1));
        lowest[c] += build_table(y, table + 16 * j, table + 64 + 16 * j);
      }
  }
}

// Looks up the plane of `width` bits of `chunks` chunks. p is the plane's first vector of tile 0, tiles lie
// tile_bytes apart, table[limb] holds the first chunk's tables.
template <size_t width, int limbs>
LOWBIT_INLINE void look_up_plane(Lookups (&sums)[limbs], const uint8_t* p, size_t tile_bytes,
                                 const uint8_t* const (&table)[limbs], size_t chunks) {
  unroll<limbs>([&](auto limb) LOWBIT_UNROLLED { sums[limb] = no_lookups(); });
  for (size_t c = 0; c < chunks; ++c, p += 2 * tile_bytes) {
    unroll<width>([&](auto v) LOWBIT_UNROLLED {
      const Nibbles n = load_nibbles(p + 64 * v, p + 64 * v + tile_bytes);
      unroll<limbs>([&](auto limb) LOWBIT_UNROLLED {
        add_lookups(sums[limb], n, table[limb] + (c * width + v) * 2 * kNibbleTableBytes);
      });
      fetch_ahead<1>(p + 64 * v);
      fetch_ahead<1>(p + 64 * v + tile_bytes);
    });
  }
}
static_assert(kActivationGroup == 2 * kChunk, "a segment has at most four vectors, as Lookups can hold");

// The lookups of a plane in one segment, and the smallest entries that they lack.
template <size_t width, int limbs>
struct Plane {
  Lookups sums[limbs];
  int32_t lowest[limbs];
  LOWBIT_INLINE Plane(const Operands& o, const Segment& s, const uint8_t* p, size_t tile_bytes) {
    const size_t c = s.k / kChunk, count = (s.end - s.k) / kChunk;
    const uint8_t* table[limbs];
    unroll<limbs>([&](auto limb) LOWBIT_UNROLLED {
      const uint8_t* const tables = o.tables[width - 1] + limb * limb_table_bytes(o.chunks, width);
      const int32_t* const least = reinterpret_cast<const int32_t*>(tables) + c;
      lowest[limb] = least[0] + (count == 2 ? least[1] : 0);
      table[limb] = tables + lowest_bytes(o.chunks) + c * 2 * width * kNibbleTableBytes;
    });
    look_up_plane<width, limbs>(sums, p, tile_bytes, table, count);
  }
};

template <int bits, int limbs>
void sums_of(const CodeTerm&, const Operands& o, const Segment* segments, size_t count, I32* out) {
  constexpr size_t tile_bytes = 64 * bits;
  for (const Segment* s = segments; s < segments + count; ++s, out += 2 * limbs) {
    const uint8_t* const codes = o.codes + s->k / kChunk * 2 * tile_bytes;
    I32 sum[limbs][2];
    int32_t from[limbs] = {};
    from[limbs - 1] = s->start;
    if constexpr ((bits & 1) != 0) {  // the codes of one bit, or bit 2 of those of three
      const Plane<1, limbs> one(o, *s, codes + (bits == 3 ? 128 : 0), tile_bytes);
      unroll<limbs>([&](auto limb) LOWBIT_UNROLLED {
        end_lookups(sum[limb], one.sums[limb]);
        from[limb] += one.lowest[limb] * (bits == 3 ? 4 : 1);
        if constexpr (bits == 3)
          unroll<2>([&](auto tile) LOWBIT_UNROLLED { sum[limb][tile] = shift_left<2>(sum[limb][tile]); });
      });
    }
    if constexpr ((bits & 2) != 0) {
      const Plane<2, limbs> two(o, *s, codes, tile_bytes);
      unroll<limbs>([&](auto limb) LOWBIT_UNROLLED {
        I32 pair[2];
        end_lookups(pair, two.sums[limb]);
        from[limb] += two.lowest[limb];
        unroll<2>([&](auto tile) LOWBIT_UNROLLED {
          sum[limb][tile] = bits == 3 ? add(sum[limb][tile], pair[tile]) : pair[tile];
        });
      });
    }
    unroll<2 * limbs>(
        [&](auto i) LOWBIT_UNROLLED { out[i] = add(sum[i % limbs][i / limbs], set1_i32(from[i % limbs])); });
  }
}

template <int bits>
SegmentSums kernel(int limbs) {
  return limbs == 2 ? sums_of<bits, 2> : sums_of<bits, 1>;
}

}  // namespace

void build_tables(const Activations& a, int width, uint8_t* tables) {
  const size_t chunks = a.padded / kChunk;
  const auto build = width == 1 ? build_limb<1> : build_limb<2>;
  build(a.high, chunks, tables);
  if (a.limbs == 2) build(a.low, chunks, tables + limb_table_bytes(chunks, width));
}

SegmentSums table_sums(const CodeTerm& t, int limbs) {
  if (t.bits == 1) return kernel<1>(limbs);
  return t.bits == 2 ? kernel<2>(limbs) : kernel<3>(limbs);
}

}  // namespace lowbit::LOWBIT_ISA
