// Single rows of the terms beside codes, as float32 (embedding lookup), and what they weigh.
#include <algorithm>
#include <vector>

#include "layout.h"
#include "matmul.h"
#include "side_terms.h"

namespace lowbit {
namespace {

// `bits` bits of a stream from bit `first` on.
size_t field(const uint8_t* stream, size_t first, size_t bits) {
  const uint8_t* p = stream + first / 8;
  return (p[0] | static_cast<size_t>(p[1]) << 8) >> first % 8 & ((size_t{1} << bits) - 1);
}

float level_of(const CodeTerm& t, size_t code) {
  if (t.map == Map::linear) return static_cast<float>(t.step * static_cast<int32_t>(code) + t.base);
  if (t.map == Map::table1) return static_cast<float>(t.high[code] - 128);
  return static_cast<float>(kLimbBase * (t.high[code] - 128) + (t.low[code] - 128));
}

uint64_t mask_word(const uint8_t* p) {
  uint64_t word = 0;
  for (int i = 7; i >= 0; --i) word = word << 8 | p[i];
  return word;
}

}  // namespace

void add_sparse_row(const Matrix& m, size_t row, float* out) {
  const size_t block = row / kBlockRows, lane = row % kBlockRows;
  for (const SparseTerm& s : m.sparse) {
    const CodeTerm& t = s.term;
    const size_t bits = static_cast<size_t>(t.bits);
    const uint8_t* mask = s.mask + block * m.chunks() * 128;
    const uint8_t* codes = s.codes + s.starts[block];
    size_t n = 0;
    for (size_t step = 0; step < m.chunks() * 16; ++step, mask += 8) {  // 8 of tile 0, 8 of tile 1, ..
      const uint64_t word = mask_word(mask);
      const size_t input = step / 16 * kChunk + step % 8 * 4;
      if (step / 8 % 2 == lane / kTileRows) {
        for (size_t j = 0; j < 4 && input + j < m.in_features; ++j) {
          const size_t bit = 4 * (lane % kTileRows) + j;
          if (!(word >> bit & 1)) continue;
          const uint64_t below = word & ((uint64_t{1} << bit) - 1);
          const size_t code =
              field(codes, (n + static_cast<size_t>(__builtin_popcountll(below))) * bits, bits);
          const size_t group = (input + j) / t.group_size;
          const float scale =
              number_at(t.scale_type, t.scales, (block * t.groups + group) * kBlockRows + lane);
          out[input + j] += scale * t.unit * level_of(t, code);
        }
      }
      n += static_cast<size_t>(__builtin_popcountll(word));
    }
  }
}

void densify(const SparseTerm& s, size_t chunks, int bits, size_t first, size_t last, uint8_t* codes) {
  const size_t tile_bytes = 64 * static_cast<size_t>(bits), width = static_cast<size_t>(s.term.bits);
  for (size_t block = first; block < last; ++block) {
    const uint8_t* stream = s.codes + s.starts[block];
    size_t n = 0;
    for (size_t tile = block * chunks * 2; tile < (block + 1) * chunks * 2; ++tile) {
      uint8_t steps[512];
      for (size_t step = 0; step < 8; ++step) {
        const uint64_t word = mask_word(s.mask + tile * 64 + step * 8);
        for (size_t bit = 0; bit < 64; ++bit) {
          const bool kept = word >> bit & 1;
          steps[step * 64 + bit] = kept ? static_cast<uint8_t>(field(stream, n * width, width)) : s.zero;
          n += kept;
        }
      }
      pack_tile(steps, bits, codes + tile * tile_bytes);
    }
  }
}

void add_side_row(const Matrix& m, size_t row, float* out) {
  const size_t block = row / kBlockRows, lane = row % kBlockRows;
  for (const ColumnsTerm& t : m.columns)
    for (size_t j = 0; j < t.columns.size(); ++j)
      out[t.columns[j]] +=
          number_at(Number::fp16, t.values, (block * t.columns.size() + j) * kBlockRows + lane);
  for (const LowRankTerm& t : m.low_rank) {
    std::vector<float> sum(m.in_features, 0.0f);
    for (size_t r = 0; r < t.rank; ++r) {
      const float u = number_at(Number::fp16, t.u, (block * t.rank + r) * kBlockRows + lane);
      for (size_t k = 0; k < m.in_features; ++k)
        sum[k] += u * number_at(Number::fp16, t.v, r * m.in_features + k);
    }
    for (size_t k = 0; k < m.in_features; ++k) out[k] += sum[k];
  }
  for (const EntriesTerm& t : m.entries)
    for (size_t i = t.starts[block]; i < t.starts[block + 1]; ++i)
      if (t.rows[i] == lane) {
        uint16_t half;
        uint32_t column;
        __builtin_memcpy(&half, t.values + 2 * i, 2);
        __builtin_memcpy(&column, t.columns + 4 * i, 4);
        out[column] += number_at(Number::fp16, &half, 0);
      }
  for (const RowsTerm& t : m.rows) {
    const auto place = std::lower_bound(t.rows.begin(), t.rows.end(), row);
    if (place == t.rows.end() || *place != row) continue;
    std::vector<float> more(m.in_features);
    dequantize_row(*t.matrix, static_cast<size_t>(place - t.rows.begin()), more.data());
    for (uint32_t column : m.excluded) more[column] = 0;
    for (size_t k = 0; k < m.in_features; ++k) out[k] += more[k];
  }
  for (const GatheredTerm& t : m.gathered) {
    std::vector<float> ordered(t.inputs.size());
    dequantize_row(*t.matrix, row, ordered.data());
    for (size_t k = 0; k < t.inputs.size(); ++k)
      if (t.inputs[k] != kNoInput) out[t.inputs[k]] += ordered[k];
  }
}

size_t side_bytes(const Matrix& m) {
  size_t total = 0;
  for (const SparseTerm& s : m.sparse)
    total += m.blocks() * (m.chunks() * 128 + s.term.groups * kBlockRows * number_bytes(s.term.scale_type)) +
             s.starts.back();
  for (const ColumnsTerm& t : m.columns) total += t.columns.size() * (m.blocks() * kBlockRows * 2 + 4);
  for (const EntriesTerm& t : m.entries) total += size_t{7} * t.starts.back() + 4 * t.starts.size();
  for (const LowRankTerm& t : m.low_rank) total += 2 * t.rank * (m.blocks() * kBlockRows + m.in_features);
  for (const RowsTerm& t : m.rows) total += t.matrix->bytes() + 4 * t.rows.size();
  for (const GatheredTerm& t : m.gathered) total += t.matrix->bytes() + 4 * t.inputs.size();
  return total;
}

}  // namespace lowbit
