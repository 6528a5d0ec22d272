// Single numbers and single rows out of packed weights, one after the other: for embeddings, not for
// products.
#include <cmath>
#include <cstring>

#include "matmul.h"
#include "side_terms.h"

namespace lowbit {

float number_at(Number type, const void* base, size_t index) {
  uint32_t x;
  switch (type) {
    case Number::fp32:
      return static_cast<const float*>(base)[index];
    case Number::bf16:
      x = static_cast<uint32_t>(static_cast<const uint16_t*>(base)[index]) << 16;
      break;
    case Number::e8m0:
      x = static_cast<uint32_t>(static_cast<const uint8_t*>(base)[index]) << 23;
      break;
    case Number::e4m3: {
      const int code = static_cast<const uint8_t*>(base)[index];
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      const float magnitude = exponent ? std::ldexp(8.0f + mantissa, exponent - 10)
                                       : std::ldexp(static_cast<float>(mantissa), -9);
      return code & 128 ? -magnitude : magnitude;
    }
    default: {
      const uint16_t h = static_cast<const uint16_t*>(base)[index];
      const int exponent = h >> 10 & 31, mantissa = h & 1023;
      float magnitude = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                 : std::ldexp(static_cast<float>(mantissa), -24);
      if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
      return h & 0x8000 ? -magnitude : magnitude;
    }
  }
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}

namespace {

// The code of input k of a row of a tile; `codes` points at the tile in the block's first chunk or vector.
size_t code_at(const CodeTerm& t, const uint8_t* codes, size_t row, size_t k) {
  const size_t byte = 4 * row + k % 4;
  if (t.base3) {
    const size_t step = k / 4;
    return trits_of(codes[step / kTritSteps * 128 + byte]).codes[step % kTritSteps];
  }
  // Step s of an n-bit plane lies in vector s * n / 8.
  const size_t bits = static_cast<size_t>(t.bits), step = k % kChunk / 4;
  const uint8_t* p = codes + k / kChunk * 2 * 64 * bits + byte;
  size_t code = 0, position = 0;
  for (size_t width = 8; width; width /= 2) {
    if (!(bits & width)) continue;
    const size_t per_vector = 8 / width;
    code |= (p[64 * (step / per_vector)] >> (step % per_vector * width) & ((1u << width) - 1)) << position;
    position += width;
    p += 64 * width;
  }
  return code;
}

float factor_at(const uint8_t* factors, size_t index) {
  return factors ? static_cast<float>(static_cast<int8_t>(factors[index])) : 1.0f;
}

}  // namespace

void dequantize_row(const Matrix& m, size_t row, float* out) {
  const size_t block = row / kBlockRows, lane = row % kBlockRows, tile = lane / kTileRows;
  std::memset(out, 0, m.in_features * sizeof(float));
  for (const CodeTerm& t : m.codes) {
    const uint8_t* codes = t.codes + block * code_block_bytes(t, m.chunks()) +
                           tile * 64 * (t.base3 ? 1 : static_cast<size_t>(t.bits));
    float scale = 0, zero = 0, offset = 0;
    size_t table = 0;
    for (size_t k = 0; k < m.in_features; ++k) {
      if (k % t.group_size == 0) {
        const size_t index = (block * t.groups + k / t.group_size) * kBlockRows + lane;
        const size_t wide = t.factors ? index / kBlockRows / t.span * kBlockRows + lane : index;
        scale = number_at(t.scale_type, t.scales, wide) * factor_at(t.factors, index) * t.unit;
        zero = t.zero_points ? t.zero_points[index] : 0;
        offset =
            t.offsets ? number_at(t.offset_type, t.offsets, wide) * factor_at(t.offset_factors, index) : 0;
        table = t.selectors ? 16u * t.selectors[index] : 0;
      }
      const size_t code = code_at(t, codes, lane % kTileRows, k);
      float level;
      if (t.map == Map::linear)
        level = static_cast<float>(t.step * static_cast<int32_t>(code) + t.base);
      else if (t.map == Map::table1)
        level = static_cast<float>(t.high[table + code] - 128);
      else
        level = static_cast<float>(kLimbBase * (t.high[table + code] - 128) + (t.low[table + code] - 128));
      if (t.multipliers) {
        const size_t group = block * t.multiplier_groups + k / t.multiplier_size;
        const uint8_t pair = t.multipliers[group * kTileRows + lane % kTileRows];
        level *= static_cast<float>(tile ? pair >> 4 : pair & 15);
      }
      out[k] += scale * (level - zero) + offset;
    }
  }
  add_sparse_row(m, row, out);
  for (uint32_t column : m.excluded) out[column] = 0;
  for (const FloatTerm& t : m.floats) {
    if (!t.values) {
      static thread_local std::vector<uint16_t> coded;
      coded.resize(m.in_features);
      entropy_row(t.entropy, m.in_features, row, coded.data());
      for (size_t k = 0; k < m.in_features; ++k) out[k] += number_at(t.type, coded.data(), k);
      continue;
    }
    for (size_t k = 0; k < m.in_features; ++k)
      out[k] += number_at(t.type, t.values, (block * m.in_features + k) * kBlockRows + lane);
  }
  add_side_row(m, row, out);
}

}  // namespace lowbit
