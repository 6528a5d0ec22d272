// Tables of sums for codes of one bit (AVX-512 with VBMI), see isa/bits.cc. A vector of one-bit codes holds a
// byte for each row and j = 0..3, whose bit s stands for input 4 s + j; a nibble of it says which of the
// inputs j, 4 + j, 8 + j, 12 + j are added up. The sums of these four, all 16 of them for each j, are 64
// entries, as many as one lookup reaches.
#pragma once

#include "simd/signed_dot.h"

namespace lowbit::LOWBIT_ISA {

#if defined(LOWBIT_ISA_avx512)
#define LOWBIT_BIT_TABLES 1

// Entry 16 j + n is 32 * (high - 16) + low, both in [0, 31]: eight of each add up within a byte.
struct BitTables {
  U8 low, high;
};

struct BitPatterns {
  alignas(64) uint8_t bits[2][64];       // of entries in pairs of bytes: two inputs of the four, 0 or 1
  alignas(64) uint8_t inputs[2][2][64];  // [j / 2][pair]: where those inputs are
  alignas(64) uint8_t evens[64];         // even bytes of two vectors
  alignas(64) uint8_t rows[64];          // 16 j in each byte
};
constexpr BitPatterns make_bit_patterns() {
  BitPatterns p = {};
  for (int i = 0; i < 64; ++i) {
    const int n = i / 2 % 16, odd = i % 2, j = i / 32;
    for (int pair = 0; pair < 2; ++pair) {
      p.bits[pair][i] = static_cast<uint8_t>(n >> (2 * pair + odd) & 1);
      for (int half = 0; half < 2; ++half)
        p.inputs[half][pair][i] = static_cast<uint8_t>(4 * (2 * pair + odd) + 2 * half + j);
    }
    p.evens[i] = static_cast<uint8_t>(2 * i);
    p.rows[i] = static_cast<uint8_t>(i % 4 * 16);
  }
  return p;
}
constexpr BitPatterns kBitPatterns = make_bit_patterns();

// The tables of 16 activations.
LOWBIT_INLINE BitTables bit_tables(const int8_t* x) {
  const __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  const auto load = [](const uint8_t* p) { return _mm512_load_si512(p); };
  __m512i sum[2];
  for (int half = 0; half < 2; ++half) {
    const __m512i first = _mm512_shuffle_epi8(v, load(kBitPatterns.inputs[half][0]));
    const __m512i second = _mm512_shuffle_epi8(v, load(kBitPatterns.inputs[half][1]));
    sum[half] = _mm512_add_epi16(_mm512_maddubs_epi16(load(kBitPatterns.bits[0]), first),
                                 _mm512_maddubs_epi16(load(kBitPatterns.bits[1]), second));
  }
  const __m512i evens = load(kBitPatterns.evens);
  const __m512i low = _mm512_permutex2var_epi8(sum[0], evens, sum[1]);
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_srli_epi16(sum[0], 5), evens, _mm512_srli_epi16(sum[1], 5));
  return {{_mm512_and_si512(low, _mm512_set1_epi8(31))}, {_mm512_add_epi8(high, _mm512_set1_epi8(16))}};
}

// table[index], of which the low six bits count.
LOWBIT_INLINE U8 find(U8 table, U8 index) { return {_mm512_permutexvar_epi8(index.v, table.v)}; }
// Indices of the nibble that is low in `codes`: 16 j besides.
LOWBIT_INLINE U8 bit_indices(U8 codes) { return merge(codes, load_u8(kBitPatterns.rows), set1_u8(0x0f)); }
// sum + found, in this order: GCC makes trees of additions, for which there are not enough registers.
LOWBIT_INLINE U8 add_in_order(U8 sum, U8 found) {
  U8 a = add_bytes(sum, found);
  asm("" : "+v"(a.v));
  return a;
}

#endif

}  // namespace lowbit::LOWBIT_ISA
