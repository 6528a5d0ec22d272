#include "repack.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "layout.h"
#include "matrix.h"
#include "repack_blocks.h"
#include "repack_grids.h"
#include "team.h"

namespace lowbit {

namespace {

constexpr size_t kQuarter = 64;  // bytes of one step: 16 rows x 4 inputs

// The rows of a file that a block of the result takes; fewer than 32 in the last one.
struct Sources {
  const uint8_t* rows[kBlockRows];
  size_t live;
};

Sources find_sources(size_t block, const uint8_t* raw, size_t rows, size_t row_bytes, const int64_t* order) {
  Sources s = {{}, std::min(kBlockRows, rows - block * kBlockRows)};
  for (size_t row = 0; row < s.live; ++row) {
    const size_t wanted = block * kBlockRows + row;
    s.rows[row] = raw + (order ? static_cast<size_t>(order[wanted]) : wanted) * row_bytes;
  }
  return s;
}

// The scales, factors and offsets of one block of 32 result rows; Scale is how a scale is stored.
template <class Type, typename Scale>
void repack_numbers(size_t block, const Sources& sources, size_t columns, const Repacked& out) {
  constexpr BlockType type = Type::type;
  constexpr size_t groups = type.weights / type.group, scales = type.scales();
  const size_t blocks = columns / type.weights, first = block * blocks * kBlockRows;
  Scale* const to = static_cast<Scale*>(out.scales);
  for (size_t b = 0; b < blocks; ++b)
    for (size_t row = 0; row < kBlockRows; ++row) {
      blocks::Numbers n = {};
      if (row < sources.live) Type::numbers(sources.rows[row] + b * type.bytes, &n);
      const size_t at = first + b * kBlockRows;
      for (size_t i = 0; i < scales; ++i)
        to[at * scales + i * kBlockRows + row] = static_cast<Scale>(n.scales[i]);
      if (type.offsets) out.offsets[at * scales + row] = n.offset;
      if (!type.factors) continue;
      for (size_t g = 0; g < groups; ++g) {
        const size_t place = at * groups + g * kBlockRows + row;
        out.factors[place] = n.factors[g];
        if (type.offsets) out.offset_factors[place] = n.offset_factors[g];
      }
    }
}

template <class Type>
void repack_planes(size_t block, const Sources& sources, size_t columns, const uint8_t* grid,
                   uint8_t* codes) {
  constexpr BlockType type = Type::type;
  constexpr size_t chunks_per_block = type.weights / kChunk;
  constexpr size_t tile_bytes = kQuarter * static_cast<size_t>(type.bits);
  const size_t chunks = columns / kChunk;
  codes += block * chunks * 2 * tile_bytes;
  alignas(64) uint8_t steps[8 * kQuarter];
  for (size_t c = 0; c < chunks; ++c)
    for (size_t tile = 0; tile < 2; ++tile) {
      for (size_t row = 0; row < kTileRows; ++row) {
        const size_t r = tile * kTileRows + row;
        alignas(32) uint8_t decoded[kChunk] = {};
        if (r < sources.live)
          Type::codes(sources.rows[r] + c / chunks_per_block * type.bytes, c % chunks_per_block, grid,
                      decoded);
        for (size_t s = 0; s < 8; ++s) std::memcpy(steps + s * kQuarter + row * 4, decoded + s * 4, 4);
      }
      pack_tile(steps, type.bits, codes + (c * 2 + tile) * tile_bytes);
    }
}

// Vectors of base 3 take 20 inputs and blocks of a file 256: whole rows are decoded first.
template <class Type>
void repack_base3(size_t block, const Sources& sources, size_t columns, std::vector<uint8_t>& memory,
                  uint8_t* codes) {
  constexpr BlockType type = Type::type;
  constexpr size_t chunks_per_block = type.weights / kChunk;
  const size_t vectors = round_up(columns, kBase3Inputs) / kBase3Inputs, stride = vectors * kBase3Inputs;
  memory.assign(kBlockRows * stride, kBase3Padding);
  for (size_t row = 0; row < sources.live; ++row)
    for (size_t c = 0; c < columns / kChunk; ++c)
      Type::codes(sources.rows[row] + c / chunks_per_block * type.bytes, c % chunks_per_block, nullptr,
                  memory.data() + row * stride + c * kChunk);
  codes += block * vectors * 2 * kQuarter;
  alignas(64) uint8_t steps[kBase3Steps * kQuarter];
  for (size_t v = 0; v < vectors; ++v)
    for (size_t tile = 0; tile < 2; ++tile) {
      for (size_t row = 0; row < kTileRows; ++row) {
        const uint8_t* from = memory.data() + (tile * kTileRows + row) * stride + v * kBase3Inputs;
        for (size_t s = 0; s < kBase3Steps; ++s) std::memcpy(steps + s * kQuarter + row * 4, from + s * 4, 4);
      }
      pack_base3_vector(steps, codes + (v * 2 + tile) * kQuarter);
    }
}

template <class Type>
void repack_all(const uint8_t* raw, size_t rows, size_t columns, const int64_t* order, const uint8_t* grid,
                const Repacked& out) {
  constexpr BlockType type = Type::type;
  using Scale = std::conditional_t<type.scale_bytes == 2, uint16_t, uint8_t>;
  team()->run([&](const Member& member) {
    std::vector<uint8_t> memory;
    size_t begin, end;
    member.share(round_up(rows, kBlockRows) / kBlockRows, &begin, &end);
    for (size_t block = begin; block < end; ++block) {
      const Sources sources = find_sources(block, raw, rows, columns / type.weights * type.bytes, order);
      repack_numbers<Type, Scale>(block, sources, columns, out);
      if constexpr (type.bits == 2 && !type.factors) {
        if (out.base3) {
          repack_base3<Type>(block, sources, columns, memory, out.codes);
          continue;
        }
      }
      repack_planes<Type>(block, sources, columns, grid, out.codes);
    }
  });
}

using Repack = void (*)(const uint8_t*, size_t, size_t, const int64_t*, const uint8_t*, const Repacked&);

struct Row {
  BlockType type;
  Repack run;
};

template <class Type>
constexpr Row row() {
  return {Type::type, &repack_all<Type>};
}

using namespace blocks;
constexpr Row kTypes[] = {
    row<Q4_0>(),  row<Q4_1>(),    row<Q5_0>(),   row<Q5_1>(),   row<Q8_0>(),    row<Q2_K>(),
    row<Q3_K>(),  row<Q4_K>(),    row<Q5_K>(),   row<Q6_K>(),   row<Q1_0>(),    row<TQ1_0>(),
    row<TQ2_0>(), row<MXFP4>(),   row<NVFP4>(),  row<IQ4_NL>(), row<IQ4_XS>(),  row<IQ1_S>(),
    row<IQ1_M>(), row<IQ2_XXS>(), row<IQ2_XS>(), row<IQ2_S>(),  row<IQ3_XXS>(), row<IQ3_S>(),
};

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
            const uint8_t* grid, const Repacked& out) {
  for (const Row& row : kTypes)
    if (row.type.number == type.number) row.run(raw, rows, columns, order, grid, out);
}

void transpose_values(const void* values, size_t item_bytes, size_t rows, size_t columns,
                      const int64_t* order, void* packed) {
  if (item_bytes == 2) transpose_all<uint16_t>(values, rows, columns, order, packed);
  if (item_bytes == 4) transpose_all<uint32_t>(values, rows, columns, order, packed);
}

}  // namespace lowbit
