// Byte layouts: ggml-common.h and ggml-quants.c of the ggml project, as restated in model/gguf_types.py.
#include "repack.h"

#include <algorithm>
#include <cstring>

#include "layout.h"
#include "matrix.h"
#include "team.h"

namespace lowbit {

namespace {

constexpr size_t kQuarter = 64;  // bytes of one step: 16 rows x 4 inputs

uint16_t load16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// fp16 to float, exactly, subnormals, infinities and NaN included.
float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7FFF;
  float value;
  if (rest < 0x400) {  // zero and subnormals are multiples of 2^-24
    value = static_cast<float>(rest) * 0x1p-24f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
  }
  const uint32_t exponent = rest >= 0x7C00 ? 0x7F800000u : (rest & 0x7C00u) * 0x2000u + 0x38000000u;
  const uint32_t bits = sign | exponent | (rest & 0x3FFu) << 13;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// Each type below knows how to give the 32 codes of chunk `c` of a block, and the scales and offsets of all
// groups of a block. `Scale` is what is stored for a scale: the bits of fp16, or a float product.

void nibbles(const uint8_t* packed, uint8_t* codes) {
  for (size_t i = 0; i < 16; ++i) {
    codes[i] = packed[i] & 15;
    codes[i + 16] = packed[i] >> 4;
  }
}

// Adds bit i of four bytes to code i, at bit 4.
void fifth_bits(const uint8_t* packed, uint8_t* codes) {
  for (size_t i = 0; i < 32; ++i) codes[i] |= static_cast<uint8_t>((packed[i / 8] >> (i % 8) & 1) << 4);
}

struct Q4_0 {
  using Scale = uint16_t;
  static constexpr BlockType type{2, 32, 18, 4, 32, false, false};
  static void codes(const uint8_t* b, size_t, uint8_t* out) { nibbles(b + 2, out); }
  static void factors(const uint8_t* b, Scale* scales, Scale*) { scales[0] = load16(b); }
};

struct Q4_1 {
  using Scale = uint16_t;
  static constexpr BlockType type{3, 32, 20, 4, 32, false, true};
  static void codes(const uint8_t* b, size_t, uint8_t* out) { nibbles(b + 4, out); }
  static void factors(const uint8_t* b, Scale* scales, Scale* offsets) {
    scales[0] = load16(b);
    offsets[0] = load16(b + 2);
  }
};

struct Q5_0 {
  using Scale = uint16_t;
  static constexpr BlockType type{6, 32, 22, 5, 32, false, false};
  static void codes(const uint8_t* b, size_t, uint8_t* out) {
    nibbles(b + 6, out);
    fifth_bits(b + 2, out);
  }
  static void factors(const uint8_t* b, Scale* scales, Scale*) { scales[0] = load16(b); }
};

struct Q5_1 {
  using Scale = uint16_t;
  static constexpr BlockType type{7, 32, 24, 5, 32, false, true};
  static void codes(const uint8_t* b, size_t, uint8_t* out) {
    nibbles(b + 8, out);
    fifth_bits(b + 4, out);
  }
  static void factors(const uint8_t* b, Scale* scales, Scale* offsets) { Q4_1::factors(b, scales, offsets); }
};

struct Q8_0 {
  using Scale = uint16_t;
  static constexpr BlockType type{8, 32, 34, 8, 32, false, false};
  static void codes(const uint8_t* b, size_t, uint8_t* out) {
    for (size_t i = 0; i < 32; ++i) out[i] = b[2 + i] ^ 0x80;
  }
  static void factors(const uint8_t* b, Scale* scales, Scale*) { scales[0] = load16(b); }
};

// Weights 128 h + 32 j + l of a 256-block are the 2-bit field j of byte 32 h + l.
void pairs(const uint8_t* packed, size_t chunk, uint8_t* codes) {
  const uint8_t* bytes = packed + chunk / 4 * 32;
  const int shift = static_cast<int>(chunk % 4) * 2;
  for (size_t i = 0; i < 32; ++i) codes[i] = bytes[i] >> shift & 3;
}

struct Q2_K {
  using Scale = float;
  static constexpr BlockType type{10, 256, 84, 2, 16, true, true};
  static void codes(const uint8_t* b, size_t chunk, uint8_t* out) { pairs(b + 16, chunk, out); }
  static void factors(const uint8_t* b, Scale* scales, Scale* offsets) {
    const float d = half_to_float(load16(b + 80)), least = half_to_float(load16(b + 82));
    for (size_t g = 0; g < 16; ++g) {
      scales[g] = d * static_cast<float>(b[g] & 15);
      offsets[g] = -(least * static_cast<float>(b[g] >> 4));
    }
  }
};

struct Q3_K {
  using Scale = float;
  static constexpr BlockType type{11, 256, 110, 3, 16, true, false};
  static void codes(const uint8_t* b, size_t chunk, uint8_t* out) {
    pairs(b + 32, chunk, out);
    for (size_t i = 0; i < 32; ++i) out[i] |= static_cast<uint8_t>((b[i] >> chunk & 1) << 2);
  }
  static void factors(const uint8_t* b, Scale* scales, Scale*) {
    const uint8_t* packed = b + 96;  // 16 low nibbles, then 16 pairs of high bits
    const float d = half_to_float(load16(b + 108));
    for (size_t g = 0; g < 16; ++g) {
      const int low = g < 8 ? packed[g] & 15 : packed[g - 8] >> 4;
      const int high = packed[8 + g % 4] >> (g / 4 * 2) & 3;
      scales[g] = d * static_cast<float>((low | high << 4) - 32);
    }
  }
};

// The eight 6-bit factors of scale and minimum in the 12 bytes at `packed`, times d and least.
void six_bit_factors(const uint8_t* packed, float d, float least, float* scales, float* offsets) {
  for (size_t g = 0; g < 8; ++g) {
    const int scale = g < 4 ? packed[g] & 63 : (packed[g + 4] & 15) | packed[g - 4] >> 6 << 4;
    const int minimum = g < 4 ? packed[g + 4] & 63 : packed[g + 4] >> 4 | packed[g] >> 6 << 4;
    scales[g] = d * static_cast<float>(scale);
    offsets[g] = -(least * static_cast<float>(minimum));
  }
}

// Weights 64 c + 32 h + l are nibble h of byte 32 c + l.
void chunk_nibbles(const uint8_t* packed, size_t chunk, uint8_t* codes) {
  const uint8_t* bytes = packed + chunk / 2 * 32;
  const int shift = static_cast<int>(chunk % 2) * 4;
  for (size_t i = 0; i < 32; ++i) codes[i] = bytes[i] >> shift & 15;
}

struct Q4_K {
  using Scale = float;
  static constexpr BlockType type{12, 256, 144, 4, 32, true, true};
  static void codes(const uint8_t* b, size_t chunk, uint8_t* out) { chunk_nibbles(b + 16, chunk, out); }
  static void factors(const uint8_t* b, Scale* scales, Scale* offsets) {
    six_bit_factors(b + 4, half_to_float(load16(b)), half_to_float(load16(b + 2)), scales, offsets);
  }
};

struct Q5_K {
  using Scale = float;
  static constexpr BlockType type{13, 256, 176, 5, 32, true, true};
  static void codes(const uint8_t* b, size_t chunk, uint8_t* out) {
    chunk_nibbles(b + 48, chunk, out);
    for (size_t i = 0; i < 32; ++i) out[i] |= static_cast<uint8_t>((b[16 + i] >> chunk & 1) << 4);
  }
  static void factors(const uint8_t* b, Scale* scales, Scale* offsets) { Q4_K::factors(b, scales, offsets); }
};

struct Q6_K {
  using Scale = float;
  static constexpr BlockType type{14, 256, 210, 6, 16, true, false};
  static void codes(const uint8_t* b, size_t chunk, uint8_t* out) {
    const uint8_t* low = b + chunk / 4 * 64 + chunk % 2 * 32;
    const int shift = static_cast<int>(chunk % 4 / 2) * 4;
    pairs(b + 128, chunk, out);
    for (size_t i = 0; i < 32; ++i) out[i] = static_cast<uint8_t>((low[i] >> shift & 15) | out[i] << 4);
  }
  static void factors(const uint8_t* b, Scale* scales, Scale*) {
    const float d = half_to_float(load16(b + 208));
    for (size_t g = 0; g < 16; ++g) scales[g] = d * static_cast<float>(static_cast<int8_t>(b[192 + g]));
  }
};

// One block of 32 result rows.
template <class Type>
void repack_block(size_t block, const uint8_t* raw, size_t rows, size_t columns, const int64_t* order,
                  uint8_t* codes, typename Type::Scale* scales, typename Type::Scale* offsets) {
  constexpr BlockType type = Type::type;
  constexpr size_t per_block = type.weights / type.group, chunks_per_block = type.weights / kChunk;
  constexpr size_t tile_bytes = kQuarter * static_cast<size_t>(type.bits);
  const size_t blocks = columns / type.weights, groups = columns / type.group, chunks = columns / kChunk;
  const size_t live = std::min(kBlockRows, rows - block * kBlockRows);

  const uint8_t* sources[kBlockRows];
  for (size_t row = 0; row < live; ++row) {
    const size_t wanted = block * kBlockRows + row;
    const size_t stored = order ? static_cast<size_t>(order[wanted]) : wanted;
    sources[row] = raw + stored * blocks * type.bytes;
  }
  scales += block * groups * kBlockRows;
  if (type.has_offsets) offsets += block * groups * kBlockRows;
  codes += block * chunks * 2 * tile_bytes;

  alignas(64) uint8_t steps[8 * kQuarter];
  std::memset(steps, 0, sizeof steps);
  for (size_t b = 0; b < blocks; ++b) {
    for (size_t row = 0; row < kBlockRows; ++row) {
      typename Type::Scale scale[per_block] = {}, offset[per_block] = {};
      if (row < live) Type::factors(sources[row] + b * type.bytes, scale, offset);
      for (size_t g = 0; g < per_block; ++g) {
        scales[(b * per_block + g) * kBlockRows + row] = scale[g];
        if (type.has_offsets) offsets[(b * per_block + g) * kBlockRows + row] = offset[g];
      }
    }
    for (size_t c = 0; c < chunks_per_block; ++c)
      for (size_t tile = 0; tile < 2; ++tile) {
        for (size_t row = 0; row < kTileRows; ++row) {
          const size_t r = tile * kTileRows + row;
          alignas(32) uint8_t decoded[kChunk] = {};
          if (r < live) Type::codes(sources[r] + b * type.bytes, c, decoded);
          for (size_t s = 0; s < 8; ++s) std::memcpy(steps + s * kQuarter + row * 4, decoded + s * 4, 4);
        }
        pack_tile(steps, type.bits, codes + ((b * chunks_per_block + c) * 2 + tile) * tile_bytes);
      }
  }
}

template <class Type>
void repack_all(const uint8_t* raw, size_t rows, size_t columns, const int64_t* order, uint8_t* codes,
                void* scales, void* offsets) {
  using Scale = typename Type::Scale;
  team()->run([&](const Member& member) {
    size_t begin, end;
    member.share(round_up(rows, kBlockRows) / kBlockRows, &begin, &end);
    for (size_t block = begin; block < end; ++block)
      repack_block<Type>(block, raw, rows, columns, order, codes, static_cast<Scale*>(scales),
                         static_cast<Scale*>(offsets));
  });
}

using Repack = void (*)(const uint8_t*, size_t, size_t, const int64_t*, uint8_t*, void*, void*);

struct Row {
  BlockType type;
  Repack run;
};

template <class Type>
constexpr Row row() {
  return {Type::type, &repack_all<Type>};
}

constexpr Row kTypes[] = {row<Q4_0>(), row<Q4_1>(), row<Q5_0>(), row<Q5_1>(), row<Q8_0>(),
                          row<Q2_K>(), row<Q3_K>(), row<Q4_K>(), row<Q5_K>(), row<Q6_K>()};

// A block of 32 rows in strips of columns that keep both sides in the first-level cache.
template <typename Item>
void transpose_block(size_t block, const Item* values, size_t rows, size_t columns, const int64_t* order,
                     Item* packed) {
  constexpr size_t kStrip = 64;
  const size_t live = std::min(kBlockRows, rows - block * kBlockRows);
  Item* target = packed + block * columns * kBlockRows;
  for (size_t start = 0; start < columns; start += kStrip) {
    const size_t end = std::min(columns, start + kStrip);
    for (size_t r = 0; r < kBlockRows; ++r) {
      if (r >= live) {
        for (size_t i = start; i < end; ++i) target[i * kBlockRows + r] = 0;
        continue;
      }
      const size_t wanted = block * kBlockRows + r;
      const Item* source = values + (order ? static_cast<size_t>(order[wanted]) : wanted) * columns;
      for (size_t i = start; i < end; ++i) target[i * kBlockRows + r] = source[i];
    }
  }
}

template <typename Item>
void transpose_all(const void* values, size_t rows, size_t columns, const int64_t* order, void* packed) {
  team()->run([&](const Member& member) {
    size_t begin, end;
    member.share(round_up(rows, kBlockRows) / kBlockRows, &begin, &end);
    for (size_t block = begin; block < end; ++block)
      transpose_block(block, static_cast<const Item*>(values), rows, columns, order,
                      static_cast<Item*>(packed));
  });
}

}  // namespace

const BlockType* find_block_type(int number) {
  for (const Row& row : kTypes)
    if (row.type.number == number) return &row.type;
  return nullptr;
}

void repack(const BlockType& type, const uint8_t* raw, size_t rows, size_t columns, const int64_t* order,
            uint8_t* codes, void* scales, void* offsets) {
  for (const Row& row : kTypes)
    if (row.type.number == type.number) row.run(raw, rows, columns, order, codes, scales, offsets);
}

void transpose_values(const void* values, size_t item_bytes, size_t rows, size_t columns,
                      const int64_t* order, void* packed) {
  if (item_bytes == 2) transpose_all<uint16_t>(values, rows, columns, order, packed);
  if (item_bytes == 4) transpose_all<uint32_t>(values, rows, columns, order, packed);
}

}  // namespace lowbit
