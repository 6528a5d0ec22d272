// The blocks of GGUF's IQ types of 1 to 3 bits, whose weights come from grids: see repack_blocks.h, and
// model/gguf_iq.py for what their codes mean.
#pragma once

#include "repack_blocks.h"

namespace lowbit::blocks {

// Eight bytes at a time: magnitudes of a grid, or bytes of all ones where a bit is set.
constexpr uint64_t kOnes = 0x0101010101010101;

inline uint64_t members(const uint8_t* grid, size_t index) {
  uint64_t value;
  std::memcpy(&value, grid + 8 * index, 8);
  return value;
}

inline uint64_t members(const uint8_t* grid, size_t first, size_t second) {  // of four members each
  uint8_t value[8];
  std::memcpy(value, grid + 4 * first, 4);
  std::memcpy(value + 4, grid + 4 * second, 4);
  uint64_t word;
  std::memcpy(&word, value, 8);
  return word;
}

inline uint64_t sign_mask(unsigned signs) {
  struct Table {
    uint64_t mask[256];
    Table() {
      for (unsigned byte = 0; byte < 256; ++byte) {
        uint8_t lanes[8];
        for (unsigned bit = 0; bit < 8; ++bit) lanes[bit] = byte >> bit & 1 ? 0xFF : 0;
        std::memcpy(&mask[byte], lanes, 8);
      }
    }
  };
  static const Table table;
  return table.mask[signs];
}

// Seven stored signs, and the eighth that makes their number even.
inline unsigned even_signs(uint32_t field) {
  unsigned low = field & 127, parity = low ^ low >> 4;
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  return low | (parity & 1) << 7;
}

// Eight codes: middle + magnitude, or the complement for a set sign.
template <unsigned middle>
inline void put(uint64_t magnitudes, unsigned signs, uint8_t* out) {
  const uint64_t codes = (magnitudes + middle * kOnes) ^ (sign_mask(signs) & (2 * middle - 1) * kOnes);
  std::memcpy(out, &codes, 8);
}

inline int8_t odd(unsigned field) { return static_cast<int8_t>(2 * field + 1); }

struct IQ2_XXS {
  static constexpr BlockType type{16, 256, 66, 3, 32, 2, true, false, 256, 8};
  static void codes(const uint8_t* b, size_t c, const uint8_t* grid, uint8_t* out) {
    const uint8_t* p = b + 2 + 8 * c;
    const uint32_t fields = load32(p + 4);
    for (size_t i = 0; i < 4; ++i) put<4>(members(grid, p[i]), even_signs(fields >> (7 * i)), out + 8 * i);
  }
  static void numbers(const uint8_t* b, Numbers* n) {
    n->scales[0] = load16(b);
    for (size_t g = 0; g < 8; ++g) n->factors[g] = odd(b[2 + 8 * g + 7] >> 4);
  }
};

// Sixteen 4-bit fields, low nibbles first.
inline void sixteen_odd(const uint8_t* p, Numbers* n) {
  for (size_t g = 0; g < 16; ++g) n->factors[g] = odd(p[g / 2] >> (g % 2 * 4) & 15);
}

struct IQ2_XS {
  static constexpr BlockType type{17, 256, 74, 3, 16, 2, true, false, 512, 8};
  static void codes(const uint8_t* b, size_t c, const uint8_t* grid, uint8_t* out) {
    for (size_t i = 0; i < 4; ++i) {
      const unsigned field = load16(b + 2 + 8 * c + 2 * i);
      put<4>(members(grid, field & 511), even_signs(field >> 9), out + 8 * i);
    }
  }
  static void numbers(const uint8_t* b, Numbers* n) {
    n->scales[0] = load16(b);
    sixteen_odd(b + 66, n);
  }
};

struct IQ2_S {
  static constexpr BlockType type{22, 256, 82, 3, 16, 2, true, false, 1024, 8};
  static void codes(const uint8_t* b, size_t c, const uint8_t* grid, uint8_t* out) {
    for (size_t i = 0; i < 4; ++i) {
      const size_t index = b[2 + 4 * c + i] | (b[66 + c] >> (2 * i) & 3) << 8;
      put<4>(members(grid, index), b[34 + 4 * c + i], out + 8 * i);
    }
  }
  static void numbers(const uint8_t* b, Numbers* n) {
    n->scales[0] = load16(b);
    sixteen_odd(b + 74, n);
  }
};

struct IQ3_XXS {
  static constexpr BlockType type{18, 256, 98, 4, 32, 2, true, false, 256, 4};
  static void codes(const uint8_t* b, size_t c, const uint8_t* grid, uint8_t* out) {
    const uint8_t* p = b + 2 + 8 * c;
    const uint32_t fields = load32(b + 66 + 4 * c);
    for (size_t i = 0; i < 4; ++i)
      put<8>(members(grid, p[2 * i], p[2 * i + 1]), even_signs(fields >> (7 * i)), out + 8 * i);
  }
  static void numbers(const uint8_t* b, Numbers* n) {
    n->scales[0] = load16(b);
    for (size_t g = 0; g < 8; ++g) n->factors[g] = odd(b[66 + 4 * g + 3] >> 4);
  }
};

struct IQ3_S {
  static constexpr BlockType type{21, 256, 110, 4, 32, 2, true, false, 512, 4};
  static void codes(const uint8_t* b, size_t c, const uint8_t* grid, uint8_t* out) {
    const uint8_t* p = b + 2 + 8 * c;
    const unsigned high = b[66 + c];
    for (size_t i = 0; i < 4; ++i) {
      const size_t first = p[2 * i] | (high >> (2 * i) & 1) << 8;
      const size_t second = p[2 * i + 1] | (high >> (2 * i + 1) & 1) << 8;
      put<8>(members(grid, first, second), b[74 + 4 * c + i], out + 8 * i);
    }
  }
  static void numbers(const uint8_t* b, Numbers* n) {
    n->scales[0] = load16(b);
    for (size_t g = 0; g < 8; ++g) n->factors[g] = odd(b[106 + g / 2] >> (g % 2 * 4) & 15);
  }
};

struct IQ1_S {
  static constexpr BlockType type{19, 256, 50, 2, 32, 2, true, false, 2048, 8};
  static void codes(const uint8_t* b, size_t c, const uint8_t* grid, uint8_t* out) {
    const unsigned fields = load16(b + 34 + 2 * c);
    for (size_t i = 0; i < 4; ++i) {
      const uint64_t trits = members(grid, b[2 + 4 * c + i] | (fields >> (3 * i) & 7) << 8);
      const uint64_t codes = fields >> 15 ? 2 * kOnes - trits : trits;
      std::memcpy(out + 8 * i, &codes, 8);
    }
  }
  static void numbers(const uint8_t* b, Numbers* n) {
    n->scales[0] = load16(b);
    for (size_t g = 0; g < 8; ++g) {
      const unsigned fields = load16(b + 34 + 2 * g);
      const int8_t factor = odd(fields >> 12 & 7);
      n->factors[g] = fields >> 15 ? static_cast<int8_t>(-factor) : factor;
    }
  }
};

struct IQ1_M {
  static constexpr BlockType type{29, 256, 56, 3, 16, 2, true, false, 2048, 8};
  static void codes(const uint8_t* b, size_t c, const uint8_t* grid, uint8_t* out) {
    for (size_t i = 0; i < 4; ++i) {
      const unsigned high = b[32 + 2 * c + i / 2] >> (i % 2 * 4);
      const uint64_t raised = (high >> 3 & 1) ^ 1;
      const uint64_t codes = 2 * members(grid, b[4 * c + i] | (high & 7) << 8) + raised * kOnes;
      std::memcpy(out + 8 * i, &codes, 8);
    }
  }
  static void numbers(const uint8_t* b, Numbers* n) {
    unsigned scale = 0;
    for (size_t w = 0; w < 4; ++w) {
      const unsigned fields = load16(b + 48 + 2 * w);
      scale |= fields >> 12 << (4 * w);
      for (size_t g = 0; g < 4; ++g) n->factors[4 * w + g] = odd(fields >> (3 * g) & 7);
    }
    n->scales[0] = static_cast<uint16_t>(scale);
  }
};

}  // namespace lowbit::blocks
