// Reads entropy-coded bfloat16 weights with AVX-512 (VBMI, VBMI2, GFNI): 64 weights at a time, no branch, no
// table in memory. Per vector: bit-planes to codes (vpermb, gf2p8affineqb), escapes to their places
// (vpcmpeqb, vpexpandb), codes to the two bytes of a bfloat16 (vpermb, vpternlogd), those to float32
// (vpermi2b).
#pragma once

#include "../entropy.h"
#include "decode.h"

namespace lowbit::LOWBIT_ISA {

// Byte patterns that the reader loads once per block.
struct EntropyTables {
  alignas(64) uint8_t planes[2][64];   // vector: where in a record the 8 x 8 bit matrix of 8 weights lies
  alignas(64) uint8_t join[2][2][64];  // input, tile: low and high byte of a weight to bytes 2, 3 of a lane
  constexpr EntropyTables() : planes(), join() {
    for (size_t v = 0; v < 2; ++v)
      for (size_t q = 0; q < 8; ++q)
        for (size_t p = 0; p < 3; ++p)  // gf2p8affineqb gives bit i from byte 7 - i of the matrix
          planes[v][8 * q + 7 - p] = static_cast<uint8_t>(24 * v + 8 * p + q);
    for (size_t j = 0; j < 2; ++j)
      for (size_t t = 0; t < 2; ++t)
        for (size_t r = 0; r < 16; ++r) {
          join[j][t][4 * r + 2] = static_cast<uint8_t>(32 * j + 16 * t + r);
          join[j][t][4 * r + 3] = static_cast<uint8_t>(64 + 32 * j + 16 * t + r);
        }
  }
};
inline constexpr EntropyTables kEntropyTables;

class EntropyReader {
 public:
  LOWBIT_INLINE EntropyReader(const EntropyCode& code, size_t block, size_t records)
      : codes_(code.codes + block * records * kEntropyRecord),
        escapes_{code.escapes + code.offsets[2 * block], code.escapes + code.offsets[2 * block]},
        rare_(code.escapes + code.offsets[2 * block + 1]) {
    // Index 0..15: an escape; 16..22: a code of its own. gf2p8affineqb sets the 16 on its way.
    alignas(64) uint8_t exponents[64] = {};
    for (size_t i = 0; i < 15; ++i) exponents[i] = code.exponents[kEntropyDirect + i];
    for (size_t i = 0; i < kEntropyDirect; ++i) exponents[16 + i] = code.exponents[i];
    const __m512i e = _mm512_load_si512(exponents);
    high_ = _mm512_and_si512(_mm512_srli_epi16(e, 1), _mm512_set1_epi8(0x7f));
    low_ = _mm512_and_si512(_mm512_slli_epi16(e, 7), _mm512_set1_epi8(static_cast<char>(0x80)));
    for (size_t v = 0; v < 2; ++v) planes_[v] = _mm512_load_si512(kEntropyTables.planes[v]);
    for (size_t i = 0; i < 4; ++i) join_[i] = _mm512_load_si512(kEntropyTables.join[i / 2][i % 2]);
  }

  // The next record: weights of 4 inputs, two tiles of rows. `rare`: the block has escapes of a whole byte.
  template <bool rare>
  LOWBIT_INLINE void read(F32 (&w)[kEntropyInputs][2]) {
    const __m512i planes = _mm512_loadu_si512(codes_);  // 48 bytes of planes, 16 that follow
    vector<0, rare>(planes, w);
    vector<1, rare>(planes, w);
    codes_ += kEntropyRecord;
  }

  const uint8_t* position() const { return codes_; }

 private:
  template <size_t v, bool rare>
  LOWBIT_INLINE void vector(__m512i planes, F32 (&w)[kEntropyInputs][2]) {
    const __m512i matrix = _mm512_maskz_permutexvar_epi8(0xe0e0e0e0e0e0e0e0u, planes_[v], planes);
    __m512i index = _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), matrix, 16);
    const __mmask64 escaped = _mm512_cmpeq_epi8_mask(index, _mm512_set1_epi8(16 + kEntropyDirect));
    __m512i escapes = _mm512_loadu_si512(escapes_[v]);
    if constexpr (v == 1) escapes = _mm512_srli_epi16(escapes, 4);
    escapes = _mm512_and_si512(escapes, _mm512_set1_epi8(15));
    index = _mm512_mask_expand_epi8(index, escaped, escapes);
    escapes_[v] += __builtin_popcountll(escaped);
    __m512i high = _mm512_permutexvar_epi8(index, high_), low = _mm512_permutexvar_epi8(index, low_);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    if constexpr (rare) {
      const __mmask64 bytes = _mm512_cmpeq_epi8_mask(index, _mm512_set1_epi8(15));
      if (bytes) {
        const __m512i e = _mm512_maskz_expand_epi8(bytes, _mm512_loadu_si512(rare_));
        high = _mm512_or_si512(high, _mm512_andnot_si512(sign, _mm512_srli_epi16(e, 1)));
        low = _mm512_or_si512(low, _mm512_and_si512(sign, _mm512_slli_epi16(e, 7)));
        rare_ += __builtin_popcountll(bytes);
      }
    }
    const __m512i mantissas = _mm512_loadu_si512(codes_ + 48 + 64 * v);
    high = _mm512_ternarylogic_epi32(high, mantissas, sign, 0xf8);  // high | (mantissas & sign)
    low = _mm512_ternarylogic_epi32(low, mantissas, sign, 0xf4);    // low | (mantissas & ~sign)
    unroll<4>([&](auto i) LOWBIT_UNROLLED {
      const __m512i x = _mm512_maskz_permutex2var_epi8(0xccccccccccccccccu, low, join_[i], high);
      w[2 * v + i / 2][i % 2] = {_mm512_castsi512_ps(x)};
    });
  }

  const uint8_t* codes_;
  const uint8_t* escapes_[2];
  const uint8_t* rare_;
  __m512i high_, low_, planes_[2], join_[4];
};

}  // namespace lowbit::LOWBIT_ISA
