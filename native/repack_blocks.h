// What repack() needs to know about the blocks of a GGUF type, one struct each: the 32 codes of chunk `c` of
// a block, and the scales, factors and offsets of all its groups. Byte layouts: ggml-common.h and
// ggml-quants.c of the ggml project, as restated in model/gguf_linear.py, gguf_small.py and gguf_iq.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "matrix.h"
#include "repack.h"

namespace lowbit::blocks {

inline uint16_t load16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline uint32_t load32(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// The numbers of one block: as many scales as it stores, and factors of up to 16 groups.
struct Numbers {
  uint16_t scales[4];  // bits of fp16, or bytes
  uint16_t offset;     // bits of fp16
  int8_t factors[16];
  int8_t offset_factors[16];
};

constexpr uint16_t kSign = 0x8000;  // of fp16

inline void nibbles(const uint8_t* packed, uint8_t* codes) {
  for (size_t i = 0; i < 16; ++i) {
    codes[i] = packed[i] & 15;
    codes[i + 16] = packed[i] >> 4;
  }
}

// Adds bit i of four bytes to code i, at bit 4.
inline void fifth_bits(const uint8_t* packed, uint8_t* codes) {
  for (size_t i = 0; i < 32; ++i) codes[i] |= static_cast<uint8_t>((packed[i / 8] >> (i % 8) & 1) << 4);
}

// Weights 128 h + 32 j + l of a 256-block are the 2-bit field j of byte 32 h + l.
inline void pairs(const uint8_t* packed, size_t chunk, uint8_t* codes) {
  const uint8_t* bytes = packed + chunk / 4 * 32;
  const int shift = static_cast<int>(chunk % 4) * 2;
  for (size_t i = 0; i < 32; ++i) codes[i] = bytes[i] >> shift & 3;
}

// Weights 64 c + 32 h + l are nibble h of byte 32 c + l.
inline void chunk_nibbles(const uint8_t* packed, size_t chunk, uint8_t* codes) {
  const uint8_t* bytes = packed + chunk / 2 * 32;
  const int shift = static_cast<int>(chunk % 2) * 4;
  for (size_t i = 0; i < 32; ++i) codes[i] = bytes[i] >> shift & 15;
}

// A scale at byte 0, and an offset at byte 2, of 32 weights.
template <int number, size_t bytes, int bits, bool offsets>
struct Simple {
  static constexpr BlockType type{number, 32, bytes, bits, 32, 2, false, offsets};
  static void numbers(const uint8_t* b, Numbers* n) {
    n->scales[0] = load16(b);
    if (offsets) n->offset = load16(b + 2);
  }
};

struct Q4_0 : Simple<2, 18, 4, false> {
  static void codes(const uint8_t* b, size_t, const uint8_t*, uint8_t* out) { nibbles(b + 2, out); }
};
struct Q4_1 : Simple<3, 20, 4, true> {
  static void codes(const uint8_t* b, size_t, const uint8_t*, uint8_t* out) { nibbles(b + 4, out); }
};
struct Q5_0 : Simple<6, 22, 5, false> {
  static void codes(const uint8_t* b, size_t, const uint8_t*, uint8_t* out) {
    nibbles(b + 6, out);
    fifth_bits(b + 2, out);
  }
};
struct Q5_1 : Simple<7, 24, 5, true> {
  static void codes(const uint8_t* b, size_t, const uint8_t*, uint8_t* out) {
    nibbles(b + 8, out);
    fifth_bits(b + 4, out);
  }
};
struct Q8_0 : Simple<8, 34, 8, false> {
  static void codes(const uint8_t* b, size_t, const uint8_t*, uint8_t* out) {
    for (size_t i = 0; i < 32; ++i) out[i] = b[2 + i] ^ 0x80;
  }
};
struct IQ4_NL : Simple<20, 18, 4, false> {
  static void codes(const uint8_t* b, size_t, const uint8_t*, uint8_t* out) { nibbles(b + 2, out); }
};

struct Q2_K {
  static constexpr BlockType type{10, 256, 84, 2, 16, 2, true, true};
  static void codes(const uint8_t* b, size_t c, const uint8_t*, uint8_t* out) { pairs(b + 16, c, out); }
  static void numbers(const uint8_t* b, Numbers* n) {
    n->scales[0] = load16(b + 80);
    n->offset = load16(b + 82) ^ kSign;
    for (size_t g = 0; g < 16; ++g) {
      n->factors[g] = static_cast<int8_t>(b[g] & 15);
      n->offset_factors[g] = static_cast<int8_t>(b[g] >> 4);
    }
  }
};

struct Q3_K {
  static constexpr BlockType type{11, 256, 110, 3, 16, 2, true, false};
  static void codes(const uint8_t* b, size_t c, const uint8_t*, uint8_t* out) {
    pairs(b + 32, c, out);
    for (size_t i = 0; i < 32; ++i) out[i] |= static_cast<uint8_t>((b[i] >> c & 1) << 2);
  }
  static void numbers(const uint8_t* b, Numbers* n) {
    const uint8_t* packed = b + 96;  // 16 low nibbles, then 16 pairs of high bits
    n->scales[0] = load16(b + 108);
    for (size_t g = 0; g < 16; ++g) {
      const int low = g < 8 ? packed[g] & 15 : packed[g - 8] >> 4;
      const int high = packed[8 + g % 4] >> (g / 4 * 2) & 3;
      n->factors[g] = static_cast<int8_t>((low | high << 4) - 32);
    }
  }
};

// The eight 6-bit factors of scale and minimum in the 12 bytes behind their two fp16 numbers.
inline void six_bit_numbers(const uint8_t* b, Numbers* n) {
  n->scales[0] = load16(b);
  n->offset = load16(b + 2) ^ kSign;
  const uint8_t* p = b + 4;
  for (size_t g = 0; g < 8; ++g) {
    n->factors[g] = static_cast<int8_t>(g < 4 ? p[g] & 63 : (p[g + 4] & 15) | p[g - 4] >> 6 << 4);
    n->offset_factors[g] = static_cast<int8_t>(g < 4 ? p[g + 4] & 63 : p[g + 4] >> 4 | p[g] >> 6 << 4);
  }
}

struct Q4_K {
  static constexpr BlockType type{12, 256, 144, 4, 32, 2, true, true};
  static void codes(const uint8_t* b, size_t c, const uint8_t*, uint8_t* out) {
    chunk_nibbles(b + 16, c, out);
  }
  static void numbers(const uint8_t* b, Numbers* n) { six_bit_numbers(b, n); }
};

struct Q5_K {
  static constexpr BlockType type{13, 256, 176, 5, 32, 2, true, true};
  static void codes(const uint8_t* b, size_t c, const uint8_t*, uint8_t* out) {
    chunk_nibbles(b + 48, c, out);
    for (size_t i = 0; i < 32; ++i) out[i] |= static_cast<uint8_t>((b[16 + i] >> c & 1) << 4);
  }
  static void numbers(const uint8_t* b, Numbers* n) { six_bit_numbers(b, n); }
};

struct Q6_K {
  static constexpr BlockType type{14, 256, 210, 6, 16, 2, true, false};
  static void codes(const uint8_t* b, size_t c, const uint8_t*, uint8_t* out) {
    const uint8_t* low = b + c / 4 * 64 + c % 2 * 32;
    const int shift = static_cast<int>(c % 4 / 2) * 4;
    pairs(b + 128, c, out);
    for (size_t i = 0; i < 32; ++i) out[i] = static_cast<uint8_t>((low[i] >> shift & 15) | out[i] << 4);
  }
  static void numbers(const uint8_t* b, Numbers* n) {
    n->scales[0] = load16(b + 208);
    std::memcpy(n->factors, b + 192, 16);
  }
};

struct IQ4_XS {
  static constexpr BlockType type{23, 256, 136, 4, 32, 2, true, false};
  static void codes(const uint8_t* b, size_t c, const uint8_t*, uint8_t* out) {
    nibbles(b + 8 + 16 * c, out);
  }
  static void numbers(const uint8_t* b, Numbers* n) {
    n->scales[0] = load16(b);
    const int high = load16(b + 2);
    for (size_t g = 0; g < 8; ++g) {
      const int low = b[4 + g / 2] >> (g % 2 * 4) & 15;
      n->factors[g] = static_cast<int8_t>((low | (high >> (2 * g) & 3) << 4) - 32);
    }
  }
};

struct Q1_0 {
  static constexpr BlockType type{41, 128, 18, 1, 128, 2, false, false};
  static void codes(const uint8_t* b, size_t c, const uint8_t*, uint8_t* out) {
    for (size_t i = 0; i < 32; ++i) out[i] = b[2 + 4 * c + i / 8] >> (i % 8) & 1;
  }
  static void numbers(const uint8_t* b, Numbers* n) { n->scales[0] = load16(b); }
};

struct TQ2_0 {
  static constexpr BlockType type{35, 256, 66, 2, 256, 2, false, false};
  static void codes(const uint8_t* b, size_t c, const uint8_t*, uint8_t* out) { pairs(b, c, out); }
  static void numbers(const uint8_t* b, Numbers* n) { n->scales[0] = load16(b + 64); }
};

// A byte is ceil(256 q / 243) for five digits q: its product with 3^i, modulo 256, times 3 carries digit i
// into the ninth bit. Digits of 32 bytes, then of 16, then four each of 4 bytes.
struct TQ1_0 {
  static constexpr BlockType type{34, 256, 54, 2, 256, 2, false, false};
  static void codes(const uint8_t* b, size_t c, const uint8_t*, uint8_t* out) {
    constexpr uint8_t kPowers[5] = {1, 3, 9, 27, 81};
    const auto digits = [&](const uint8_t* bytes, size_t count, size_t power, uint8_t* to) {
      for (size_t i = 0; i < count; ++i)
        to[i] = static_cast<uint8_t>(static_cast<uint8_t>(bytes[i] * kPowers[power]) * 3 >> 8);
    };
    if (c < 5) return digits(b, 32, c, out);
    for (size_t half = 0; half < 2; ++half) {
      const size_t at = 2 * (c - 5) + half;  // of the sixteens behind the first 160
      if (at < 5) {
        digits(b + 32, 16, at, out + 16 * half);
        continue;
      }
      for (size_t i = 0; i < 4; ++i) digits(b + 48, 4, i, out + 16 * half + 4 * i);
    }
  }
  static void numbers(const uint8_t* b, Numbers* n) { n->scales[0] = load16(b + 52); }
};

struct MXFP4 {
  static constexpr BlockType type{39, 32, 17, 4, 32, 1, false, false};
  static void codes(const uint8_t* b, size_t, const uint8_t*, uint8_t* out) { nibbles(b + 1, out); }
  static void numbers(const uint8_t* b, Numbers* n) { n->scales[0] = b[0]; }
};

struct NVFP4 {
  static constexpr BlockType type{40, 64, 36, 4, 16, 1, false, false};
  static void codes(const uint8_t* b, size_t c, const uint8_t*, uint8_t* out) {
    for (size_t half = 0; half < 2; ++half)
      for (size_t i = 0; i < 8; ++i) {
        const uint8_t byte = b[4 + 16 * c + 8 * half + i];
        out[16 * half + i] = byte & 15;
        out[16 * half + 8 + i] = byte >> 4;
      }
  }
  static void numbers(const uint8_t* b, Numbers* n) {
    for (size_t g = 0; g < 4; ++g) n->scales[g] = b[g] == 255 ? 255 : (b[g] & 127) == 127 ? 0 : b[g] & 127;
  }
};

}  // namespace lowbit::blocks
