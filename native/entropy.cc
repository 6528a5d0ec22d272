// Coding and decoding of bfloat16 weights, one weight after the other: the definition in C++.
#include "entropy.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include "matrix.h"

namespace lowbit {
namespace {

constexpr size_t kVector = 64;     // weights: 2 inputs x 32 rows, rows within inputs
constexpr size_t kEscape = 7;      // 3-bit code
constexpr size_t kRare = 15;       // escape
constexpr size_t kPlanes = 3 * 8;  // bytes of the planes of one vector

uint64_t load64(const uint8_t* p) {
  uint64_t x = 0;
  for (size_t i = 0; i < 8; ++i) x |= static_cast<uint64_t>(p[i]) << (8 * i);
  return x;
}

void store64(uint8_t* p, uint64_t x) {
  for (size_t i = 0; i < 8; ++i) p[i] = static_cast<uint8_t>(x >> (8 * i));
}

size_t count_ones(uint64_t x) {
  x -= x >> 1 & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return x * 0x0101010101010101u >> 56;
}

struct Planes {
  uint64_t plane[3];
  uint64_t escapes() const { return plane[0] & plane[1] & plane[2]; }
  size_t code(size_t i) const {
    return (plane[0] >> i & 1) | (plane[1] >> i & 1) << 1 | (plane[2] >> i & 1) << 2;
  }
};

Planes load_planes(const uint8_t* record, size_t vector) {
  const uint8_t* p = record + vector * kPlanes;
  return {{load64(p), load64(p + 8), load64(p + 16)}};
}

uint8_t nibble(const uint8_t* escapes, size_t index, size_t vector) {
  return vector ? escapes[index] >> 4 : escapes[index] & 15;
}

uint16_t join(uint8_t mantissa, uint8_t exponent) {
  return static_cast<uint16_t>((mantissa & 128) << 8 | exponent << 7 | (mantissa & 127));
}

// The exponents of all weights by frequency; of equally frequent ones the smaller first.
std::vector<uint8_t> frequent_exponents(const uint16_t* values, size_t count) {
  std::array<size_t, 256> seen{};
  for (size_t i = 0; i < count; ++i) ++seen[values[i] >> 7 & 255];
  std::array<uint8_t, 256> order;
  std::iota(order.begin(), order.end(), uint8_t{0});
  std::stable_sort(order.begin(), order.end(), [&](uint8_t a, uint8_t b) { return seen[a] > seen[b]; });
  std::vector<uint8_t> exponents(order.begin(), order.begin() + kEntropyExponents);
  for (uint8_t& e : exponents)
    if (!seen[e]) e = 0;
  return exponents;
}

}  // namespace

EntropyArrays entropy_encode(const uint16_t* values, size_t out_features, size_t in_features) {
  const size_t blocks = round_up(out_features, kBlockRows) / kBlockRows;
  const size_t records = entropy_records(in_features);
  EntropyArrays out;
  out.exponents = frequent_exponents(values, out_features * in_features);
  std::array<uint8_t, 256> direct, escaped;
  direct.fill(kEscape);
  escaped.fill(kRare);
  for (size_t i = kEntropyExponents; i-- > 0;) {  // unused entries repeat 0, which keeps its first place
    if (i < kEntropyDirect) direct[out.exponents[i]] = static_cast<uint8_t>(i);
    if (i >= kEntropyDirect) escaped[out.exponents[i]] = static_cast<uint8_t>(i - kEntropyDirect);
  }
  out.codes.assign(blocks * records * kEntropyRecord, 0);
  out.offsets.push_back(0);
  std::vector<uint8_t> nibbles[2], rare;
  for (size_t block = 0; block < blocks; ++block) {
    nibbles[0].clear(), nibbles[1].clear(), rare.clear();
    const size_t rows = std::min(kBlockRows, out_features - block * kBlockRows);
    for (size_t record = 0; record < records; ++record) {
      uint8_t* p = &out.codes[(block * records + record) * kEntropyRecord];
      for (size_t vector = 0; vector < 2; ++vector) {
        uint64_t plane[3] = {};
        for (size_t i = 0; i < kVector; ++i) {
          const size_t row = i % kBlockRows, k = record * kEntropyInputs + vector * 2 + i / kBlockRows;
          if (row >= rows || k >= in_features) continue;  // padding: code 0, mantissa 0
          const uint16_t value = values[(block * kBlockRows + row) * in_features + k];
          const uint8_t exponent = value >> 7 & 255, code = direct[exponent];
          p[2 * kPlanes + vector * kVector + i] = static_cast<uint8_t>(value >> 8 & 128) | (value & 127);
          for (size_t bit = 0; bit < 3; ++bit) plane[bit] |= static_cast<uint64_t>(code >> bit & 1) << i;
          if (code != kEscape) continue;
          nibbles[vector].push_back(escaped[exponent]);
          if (escaped[exponent] == kRare) rare.push_back(exponent);
        }
        for (size_t bit = 0; bit < 3; ++bit) store64(p + vector * kPlanes + 8 * bit, plane[bit]);
      }
    }
    const size_t length = std::max(nibbles[0].size(), nibbles[1].size());
    nibbles[0].resize(length), nibbles[1].resize(length);
    for (size_t i = 0; i < length; ++i)
      out.escapes.push_back(static_cast<uint8_t>(nibbles[0][i] | nibbles[1][i] << 4));
    out.offsets.push_back(static_cast<uint32_t>(out.escapes.size()));
    out.escapes.insert(out.escapes.end(), rare.begin(), rare.end());
    out.offsets.push_back(static_cast<uint32_t>(out.escapes.size()));
  }
  out.escapes.resize(out.escapes.size() + kEntropyTail);
  return out;
}

std::string entropy_error(const EntropyCode& code, size_t blocks, size_t in_features, size_t escapes) {
  const size_t records = entropy_records(in_features);
  if (escapes < kEntropyTail || code.offsets[0] != 0 || code.offsets[2 * blocks] != escapes - kEntropyTail)
    return "its offsets do not span the escapes";
  for (size_t i = 0; i < 2 * blocks; ++i)
    if (code.offsets[i] > code.offsets[i + 1]) return "offset " + std::to_string(i + 1) + " runs backwards";
  for (size_t block = 0; block < blocks; ++block) {
    size_t used[2] = {};
    for (size_t record = 0; record < records; ++record)
      for (size_t vector = 0; vector < 2; ++vector)
        used[vector] += count_ones(
            load_planes(code.codes + (block * records + record) * kEntropyRecord, vector).escapes());
    const uint8_t* nibbles = code.escapes + code.offsets[2 * block];
    const size_t length = code.offsets[2 * block + 1] - code.offsets[2 * block];
    const size_t bytes = code.offsets[2 * block + 2] - code.offsets[2 * block + 1];
    size_t rare = 0;
    if (length == std::max(used[0], used[1]))
      for (size_t vector = 0; vector < 2; ++vector)
        for (size_t i = 0; i < used[vector]; ++i) rare += nibble(nibbles, i, vector) == kRare;
    if (length != std::max(used[0], used[1]) || bytes != rare)
      return "block " + std::to_string(block) + " has " + std::to_string(length) + " + " +
             std::to_string(bytes) + " bytes of escapes, its codes need " +
             std::to_string(std::max(used[0], used[1])) +
             (length == std::max(used[0], used[1]) ? " + " + std::to_string(rare) : "");
  }
  return "";
}

void entropy_block(const EntropyCode& code, size_t in_features, size_t block, size_t rows, uint16_t* out) {
  const size_t records = entropy_records(in_features);
  size_t used[2] = {};
  const uint8_t* nibbles = code.escapes + code.offsets[2 * block];
  const uint8_t* rare = code.escapes + code.offsets[2 * block + 1];
  for (size_t record = 0; record < records; ++record) {
    const uint8_t* p = code.codes + (block * records + record) * kEntropyRecord;
    for (size_t vector = 0; vector < 2; ++vector) {
      const Planes planes = load_planes(p, vector);
      for (size_t i = 0; i < kVector; ++i) {
        size_t c = planes.code(i);
        uint8_t exponent;
        if (c != kEscape) {
          exponent = code.exponents[c];
        } else {
          c = nibble(nibbles, used[vector]++, vector);
          exponent = c == kRare ? *rare++ : code.exponents[kEntropyDirect + c];
        }
        const size_t row = i % kBlockRows, k = record * kEntropyInputs + vector * 2 + i / kBlockRows;
        if (row < rows && k < in_features)
          out[row * in_features + k] = join(p[2 * kPlanes + vector * kVector + i], exponent);
      }
    }
  }
}

void entropy_row(const EntropyCode& code, size_t in_features, size_t row, uint16_t* out) {
  const size_t records = entropy_records(in_features), block = row / kBlockRows, lane = row % kBlockRows;
  const uint8_t* nibbles = code.escapes + code.offsets[2 * block];
  const uint8_t* rare = code.escapes + code.offsets[2 * block + 1];
  const bool any_rare = code.offsets[2 * block + 1] != code.offsets[2 * block + 2];
  size_t used[2] = {};
  for (size_t record = 0; record < records; ++record) {
    const uint8_t* p = code.codes + (block * records + record) * kEntropyRecord;
    for (size_t vector = 0; vector < 2; ++vector) {
      const Planes planes = load_planes(p, vector);
      const uint64_t escapes = planes.escapes();
      for (size_t j = 0; j < 2; ++j) {
        const size_t i = j * kBlockRows + lane, k = record * kEntropyInputs + vector * 2 + j;
        if (k >= in_features) break;
        const size_t before = count_ones(escapes & ((uint64_t{1} << i) - 1));
        size_t c = planes.code(i);
        uint8_t exponent = code.exponents[c % kEscape];
        if (c == kEscape) {
          c = nibble(nibbles, used[vector] + before, vector);
          exponent = code.exponents[kEntropyDirect + c % kRare];
          if (c == kRare) {
            size_t skipped = 0;
            for (size_t e = 0; e < before; ++e) skipped += nibble(nibbles, used[vector] + e, vector) == kRare;
            exponent = rare[skipped];
          }
        }
        out[k] = join(p[2 * kPlanes + vector * kVector + i], exponent);
      }
      const size_t count = count_ones(escapes);
      if (any_rare)
        for (size_t e = 0; e < count; ++e) rare += nibble(nibbles, used[vector] + e, vector) == kRare;
      used[vector] += count;
    }
  }
}

}  // namespace lowbit
