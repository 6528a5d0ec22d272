// Sums of table entries that nibbles of codes pick, for the 32 rows of a block (table.cc).
//
//   load_nibbles(p, q) -> Nibbles: 64 bytes of tile 0 and of tile 1, byte 4 * row + j
//   no_lookups() -> Lookups: sums of up to 4 such pairs of vectors, which is what the bytes in between can
//   hold add_lookups(sums, nibbles, table): the entries of both nibbles of all bytes; table[2][2][4][16]: of
//   the low
//        nibbles the low parts (below 32), then the high parts (below 24, times 32), of input j; then of the
//        high nibbles
//   end_lookups(I32[2], sums): the 16 rows of each tile
#pragma once

#include "simd.h"

namespace lowbit::LOWBIT_ISA {

#if defined(LOWBIT_ISA_avx512)

// A permutation of 64 bytes is four tables of 16 at once: the index is the nibble and, above it, the input.
struct Nibbles {
  __m512i tile[2];
};
struct Lookups {
  __m512i low[2], high[2];  // bytes, four of a row
};
LOWBIT_INLINE Nibbles load_nibbles(const uint8_t* p, const uint8_t* q) {
  return {{load_once(p).v, load_once(q).v}};
}
LOWBIT_INLINE Lookups no_lookups() {
  const __m512i zero = _mm512_setzero_si512();
  return {{zero, zero}, {zero, zero}};
}
LOWBIT_INLINE void add_tile(__m512i& low_sum, __m512i& high_sum, __m512i x, __m512i low, __m512i high) {
  const __m512i nibble = _mm512_set1_epi8(0x0f), input = _mm512_set1_epi32(0x30201000);
  const __m512i index = _mm512_ternarylogic_epi32(x, nibble, input, 0xea);  // (x & nibble) | input
  low_sum = _mm512_add_epi8(low_sum, _mm512_permutexvar_epi8(index, low));
  high_sum = _mm512_add_epi8(high_sum, _mm512_permutexvar_epi8(index, high));
}
LOWBIT_INLINE void add_lookups(Lookups& sums, const Nibbles& n, const uint8_t* table) {
  const __m512i low = _mm512_loadu_si512(table), high = _mm512_loadu_si512(table + 64);
  add_tile(sums.low[0], sums.high[0], n.tile[0], low, high);
  add_tile(sums.low[1], sums.high[1], n.tile[1], low, high);
  const __m512i low2 = _mm512_loadu_si512(table + 128), high2 = _mm512_loadu_si512(table + 192);
  add_tile(sums.low[0], sums.high[0], _mm512_srli_epi16(n.tile[0], 4), low2, high2);
  add_tile(sums.low[1], sums.high[1], _mm512_srli_epi16(n.tile[1], 4), low2, high2);
}
LOWBIT_INLINE I32 joined(__m512i low, __m512i high) {
  const __m512i one = _mm512_set1_epi8(1), weight = _mm512_set1_epi8(32), zero = _mm512_setzero_si512();
  return {_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, low, one), high, weight)};
}
LOWBIT_INLINE void end_lookups(I32 (&tile)[2], const Lookups& sums) {
  tile[0] = joined(sums.low[0], sums.high[0]);
  tile[1] = joined(sums.low[1], sums.high[1]);
}

#elif defined(LOWBIT_ISA_avx2) || defined(LOWBIT_ISA_avxvnni)

// A byte shuffle is one table of 16 per half, so bytes are sorted by input first: [input] holds the rows
// 0-3, 8-11 of tile 0, the same of tile 1, then 4-7, 12-15 of both, which end_lookups() undoes for free.
struct Nibbles {
  __m256i input[4];
};
struct Lookups {
  __m256i tile[2];  // int16 of 16 rows
};
LOWBIT_INLINE Nibbles load_nibbles(const uint8_t* p, const uint8_t* q) {
  const __m256i gather =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const U8 x = load_u8(p), y = load_u8(q);
  const __m256i a = _mm256_shuffle_epi8(x.a, gather), b = _mm256_shuffle_epi8(x.b, gather);
  const __m256i c = _mm256_shuffle_epi8(y.a, gather), d = _mm256_shuffle_epi8(y.b, gather);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), AB = _mm256_unpackhi_epi32(a, b);
  const __m256i cd = _mm256_unpacklo_epi32(c, d), CD = _mm256_unpackhi_epi32(c, d);
  return {{in_order(_mm256_unpacklo_epi64(ab, cd)), in_order(_mm256_unpackhi_epi64(ab, cd)),
           in_order(_mm256_unpacklo_epi64(AB, CD)), in_order(_mm256_unpackhi_epi64(AB, CD))}};
}
LOWBIT_INLINE Lookups no_lookups() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
LOWBIT_INLINE void add_entries(__m256i& sum, __m256i index, const uint8_t* table) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  sum = in_order(_mm256_add_epi8(sum, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), index)));
}
LOWBIT_INLINE void add_input(__m256i& low, __m256i& high, __m256i x, const uint8_t* table) {
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  const __m256i first = _mm256_and_si256(x, nibble);
  const __m256i second = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble);
  add_entries(low, first, table);
  add_entries(high, first, table + 64);
  add_entries(low, second, table + 128);
  add_entries(high, second, table + 192);
}
LOWBIT_INLINE void add_lookups(Lookups& sums, const Nibbles& n, const uint8_t* table) {
  const __m256i weights = _mm256_set1_epi16(0x2001);  // 1 and 32
  __m256i low = _mm256_setzero_si256(), high = low;
  add_input(low, high, n.input[0], table);
  add_input(low, high, n.input[1], table + 16);
  add_input(low, high, n.input[2], table + 32);
  add_input(low, high, n.input[3], table + 48);
  const __m256i first = _mm256_maddubs_epi16(_mm256_unpacklo_epi8(low, high), weights);
  const __m256i second = _mm256_maddubs_epi16(_mm256_unpackhi_epi8(low, high), weights);
  sums.tile[0] = in_order(_mm256_add_epi16(sums.tile[0], first));
  sums.tile[1] = in_order(_mm256_add_epi16(sums.tile[1], second));
}
LOWBIT_INLINE I32 widened(__m256i words) {
  const __m256i zero = _mm256_setzero_si256();
  return {_mm256_unpacklo_epi16(words, zero), _mm256_unpackhi_epi16(words, zero)};
}
LOWBIT_INLINE void end_lookups(I32 (&tile)[2], const Lookups& sums) {
  tile[0] = widened(sums.tile[0]);
  tile[1] = widened(sums.tile[1]);
}

#elif defined(LOWBIT_ISA_neon) || defined(LOWBIT_ISA_neondot)

// A load that takes every fourth byte sorts a tile by input, and a table lookup serves 16 rows.
struct Nibbles {
  uint8x16x4_t tile[2];
};
struct Lookups {
  uint16x8_t low[2], high[2];  // rows 0-7 and 8-15 of each tile
};
LOWBIT_INLINE Nibbles load_nibbles(const uint8_t* p, const uint8_t* q) {
  return {{vld4q_u8(p), vld4q_u8(q)}};
}
LOWBIT_INLINE Lookups no_lookups() {
  const uint16x8_t zero = vdupq_n_u16(0);
  return {{zero, zero}, {zero, zero}};
}
struct ByteSums {
  uint8x16_t low, high;
};
LOWBIT_INLINE ByteSums add_entries(ByteSums sum, uint8x16_t index, const uint8_t* table) {
  return {vaddq_u8(sum.low, vqtbl1q_u8(vld1q_u8(table), index)),
          vaddq_u8(sum.high, vqtbl1q_u8(vld1q_u8(table + 64), index))};
}
LOWBIT_INLINE ByteSums add_input(ByteSums sum, uint8x16_t x, const uint8_t* table) {
  return add_entries(add_entries(sum, vandq_u8(x, vdupq_n_u8(0x0f)), table), vshrq_n_u8(x, 4), table + 128);
}
LOWBIT_INLINE void add_tile(uint16x8_t& first, uint16x8_t& last, const uint8x16x4_t& x,
                            const uint8_t* table) {
  const uint8x16_t zero = vdupq_n_u8(0), weight = vdupq_n_u8(32);
  const ByteSums two = add_input(add_input({zero, zero}, x.val[0], table), x.val[1], table + 16);
  const ByteSums all = add_input(add_input(two, x.val[2], table + 32), x.val[3], table + 48);
  first = vmlal_u8(vaddw_u8(first, vget_low_u8(all.low)), vget_low_u8(all.high), vget_low_u8(weight));
  last = vmlal_high_u8(vaddw_high_u8(last, all.low), all.high, weight);
}
LOWBIT_INLINE void add_lookups(Lookups& sums, const Nibbles& n, const uint8_t* table) {
  add_tile(sums.low[0], sums.high[0], n.tile[0], table);
  add_tile(sums.low[1], sums.high[1], n.tile[1], table);
}
LOWBIT_INLINE int32x4_t widened(uint16x4_t x) { return vreinterpretq_s32_u32(vmovl_u16(x)); }
LOWBIT_INLINE I32 widened(uint16x8_t first, uint16x8_t last) {
  return {widened(vget_low_u16(first)), widened(vget_high_u16(first)), widened(vget_low_u16(last)),
          widened(vget_high_u16(last))};
}
LOWBIT_INLINE void end_lookups(I32 (&tile)[2], const Lookups& sums) {
  tile[0] = widened(sums.low[0], sums.high[0]);
  tile[1] = widened(sums.low[1], sums.high[1]);
}

#else

struct Nibbles {
  U8 tile[2];
};
struct Lookups {
  int32_t rows[32];
};
inline Nibbles load_nibbles(const uint8_t* p, const uint8_t* q) { return {{load_u8(p), load_u8(q)}}; }
inline Lookups no_lookups() { return {}; }
inline void add_lookups(Lookups& sums, const Nibbles& n, const uint8_t* table) {
  for (int row = 0; row < 32; ++row)
    for (int j = 0; j < 4; ++j) {
      const int byte = n.tile[row / 16].v[row % 16 * 4 + j];
      const uint8_t* const first = table + 16 * j + (byte & 15);
      const uint8_t* const second = table + 128 + 16 * j + (byte >> 4);
      sums.rows[row] += first[0] + second[0] + 32 * (first[64] + second[64]);
    }
}
inline void end_lookups(I32 (&tile)[2], const Lookups& sums) {
  for (int row = 0; row < 32; ++row) tile[row / 16].v[row % 16] = sums.rows[row];
}

#endif

}  // namespace lowbit::LOWBIT_ISA
