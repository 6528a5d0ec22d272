// Reads entropy-coded bfloat16 weights (../entropy.h) as vectors of float32, record by record.
// AVX-512 has a reader of its own; the one below serves all other instruction sets.
#pragma once

#include "../entropy.h"
#include "decode.h"

#ifdef LOWBIT_ISA_avx512
#include "entropy_avx512.h"
#else

namespace lowbit::LOWBIT_ISA {

// Byte i of entry b: bit i of b.
struct BitSpread {
  uint64_t bytes[256];
  constexpr BitSpread() : bytes() {
    for (size_t b = 0; b < 256; ++b)
      for (size_t i = 0; i < 8; ++i) bytes[b] |= static_cast<uint64_t>(b >> i & 1) << (8 * i);
  }
};
inline constexpr BitSpread kBitSpread;

class EntropyReader {
 public:
  EntropyReader(const EntropyCode& code, size_t block, size_t records)
      : codes_(code.codes + block * records * kEntropyRecord),
        escapes_{code.escapes + code.offsets[2 * block], code.escapes + code.offsets[2 * block]},
        rare_(code.escapes + code.offsets[2 * block + 1]),
        escaped_(code.exponents + kEntropyDirect) {
    for (size_t i = 0; i < kEntropyDirect; ++i) direct_[i] = code.exponents[i];
  }

  // The next record: weights of 4 inputs, two tiles of rows. `rare`: the block has escapes of a whole byte.
  template <bool rare>
  LOWBIT_INLINE void read(F32 (&w)[kEntropyInputs][2]) {
    const uint8_t* mantissas = codes_ + 48;
    for (size_t vector = 0; vector < 2; ++vector, mantissas += 64) {
      alignas(64) uint8_t exponents[64];
      const uint8_t* plane = codes_ + 24 * vector;
      for (size_t q = 0; q < 8; ++q) {
        const uint64_t c = kBitSpread.bytes[plane[q]] | kBitSpread.bytes[plane[8 + q]] << 1 |
                           kBitSpread.bytes[plane[16 + q]] << 2;
        __builtin_memcpy(exponents + 8 * q, &c, 8);
      }
      store_u8(exponents, lookup16(direct_, load_u8(exponents)));
      uint64_t planes[3];
      __builtin_memcpy(planes, plane, 24);
      for (uint64_t left = planes[0] & planes[1] & planes[2]; left; left &= left - 1) {
        const uint8_t both = *escapes_[vector]++;
        const size_t escape = vector ? both >> 4 : both & 15;
        exponents[__builtin_ctzll(left)] = rare && escape == 15 ? *rare_++ : escaped_[escape];
      }
      for (size_t i = 0; i < 4; ++i) {  // 16 rows each
        const I32 m = load_u8_i32(mantissas + 16 * i);
        const I32 exponent = shift_left<23>(load_u8_i32(exponents + 16 * i));
        const I32 mantissa = and_(shift_left<16>(m), set1_i32(0x7f0000));
        const I32 sign = and_(shift_left<24>(m), set1_i32(INT32_MIN));
        w[2 * vector + i / 2][i % 2] = from_bits(add(add(exponent, mantissa), sign));
      }
    }
    codes_ += kEntropyRecord;
  }

  const uint8_t* position() const { return codes_; }

 private:
  const uint8_t* codes_;
  const uint8_t* escapes_[2];
  const uint8_t* rare_;
  const uint8_t* escaped_;
  alignas(64) uint8_t direct_[16] = {};
};

}  // namespace lowbit::LOWBIT_ISA
#endif
