// A quantized matrix as the kernels see it: plain pointers into memory that somebody else owns.
//
// Layout (normative text in docs/formats.md). Rows are padded to blocks of 32 with zero scales, inputs
// to chunks of 32 with code 0. A chunk of one block holds two tiles of 16 rows; a tile holds 8 steps of
// four inputs. In a 64-byte vector of step s, byte 4 * row + j belongs to input 4 * s + j.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "entropy.h"

namespace lowbit {

constexpr size_t kTileRows = 16;
constexpr size_t kBlockRows = 32;
constexpr size_t kChunk = 32;              // inputs of one chunk
constexpr size_t kSumStride = 16;          // inputs between two prefix sums of the activations
constexpr size_t kActivationGroup = 64;    // activations that share one scale
constexpr int kLimbBase = 128;             // a two-limb number is 128 * high + low, low in [-64, 63]
constexpr int kLimbMax = 127 * kLimbBase;  // 16256, the largest two-limb magnitude

inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

enum class Number : uint8_t { fp32, fp16, bf16, e8m0, e4m3 };

inline size_t number_bytes(Number n) {
  return n == Number::fp32 ? 4 : (n == Number::fp16 || n == Number::bf16) ? 2 : 1;
}

// How a code becomes a number of the integer dot product.
enum class Map : uint8_t {
  linear,  // step * code + base
  table1,  // one signed byte per code
  table2,  // two limbs per code
};

struct CodeTerm {
  int bits;              // width of a stored code, 1..8
  const uint8_t* codes;  // [blocks][chunks][2][64 * bits], or with base3 [blocks][vectors][2][64]
  bool base3;            // five codes below 3 in a byte; bits is 2
  size_t vectors;        // base3 only: vectors of a tile, in_features / 20 rounded up
  size_t group_size;     // inputs per scale: a multiple of 16, or the padded row
  size_t groups;         // scales per row
  Number scale_type;
  const void* scales;          // [blocks][groups][32]
  const uint8_t* zero_points;  // [blocks][groups][32] in code units, or null
  Number offset_type;
  const void* offsets;       // [blocks][groups][32], added to scale * level, or null
  const uint8_t* selectors;  // [blocks][groups][32], which of the tables, or null
  // Levels count times a multiplier 0..15 of each `multiplier_size` inputs of a row:
  // [blocks][in_features / multiplier_size][16], rows of tile 0 in low nibbles, of tile 1 in high ones; or
  // null.
  const uint8_t* multipliers;
  size_t multiplier_size, multiplier_groups;  // inputs, a multiple of 16; in_features / multiplier_size
  // Scales and offsets are fp16 numbers of `span` neighbouring groups, [blocks][groups / span][32], times a
  // factor of each group, int8 [blocks][groups][32]; or both are null.
  const uint8_t* factors;
  const uint8_t* offset_factors;
  size_t span;
  float unit;  // value of integer level 1, times the tensor's scale
  Map map;
  int32_t step, base;  // map == linear
  int32_t count;       // map == linear: codes are below it; 0: all of 2^bits occur
  // Tables of (level + 128): the unsigned operand of the dot product. 256 entries, or 4 x 16 with selectors.
  alignas(64) uint8_t high[256];
  alignas(64) uint8_t low[256];  // map == table2 only: 128 * high + low
};

// Base 3: the five codes c0 .. c4 of a byte, of five consecutive steps.
struct Trits {
  uint8_t codes[5];
};
constexpr size_t kTritSteps = 5;

constexpr Trits trits_of(uint8_t byte) {
  const int top = byte >> 6, rest = byte & 63;
  const int n = top < 3 ? rest : 64 + rest / 3;  // c0 + 3 c1 + 9 c2 + 27 c3
  return {{static_cast<uint8_t>(n % 3), static_cast<uint8_t>(n / 3 % 3), static_cast<uint8_t>(n / 9 % 3),
           static_cast<uint8_t>(n / 27 % 3), static_cast<uint8_t>(top < 3 ? top : rest % 3)}};
}

// Stored bytes of one block of codes.
inline size_t code_block_bytes(const CodeTerm& t, size_t chunks) {
  return t.base3 ? t.vectors * 2 * 64 : chunks * 2 * 64 * static_cast<size_t>(t.bits);
}

struct FloatTerm {
  Number type;          // fp32, fp16, bf16
  const void* values;   // [blocks][in_features][32], or null: `entropy` holds them
  EntropyCode entropy;  // of bf16
};

// Codes of a part of the weights; the others are 0. Normative text in docs/formats.md, "sparse_codes".
struct SparseTerm {
  CodeTerm term;               // all but its codes; `bits` are those of a stored code
  const uint8_t* mask;         // [blocks][chunks][2][8][8 bytes], which weights have a code
  const uint8_t* codes;        // their codes, 64 readable bytes behind the last
  std::vector<size_t> starts;  // [blocks + 1], the byte where a block's codes begin
  uint8_t zero;                // of an expanded code: a weight of 0
};

// fp16 columns that multiply float activations.
struct ColumnsTerm {
  std::vector<uint32_t> columns;  // ascending
  const uint16_t* values;         // [blocks][columns][32]
};

// Single fp16 weights; those of a block are ordered by column, then by row.
struct EntriesTerm {
  std::vector<uint32_t> starts;  // [blocks + 1]
  const uint8_t* columns;        // uint32 [n], of any alignment
  const uint8_t* rows;           // [n], within the block
  const uint8_t* values;         // fp16 [n], of any alignment
};

// u * (v * x) with float activations.
struct LowRankTerm {
  size_t rank;
  const uint16_t* u;  // fp16 [blocks][rank][32]
  const uint16_t* v;  // fp16 [rank][in_features]
};

struct Matrix;

// A matrix of some rows, added to what the other terms give there.
struct RowsTerm {
  std::vector<uint32_t> rows;  // ascending
  const Matrix* matrix;        // [rows][in_features], terms of codes only
};

// Codes over inputs taken in another order: input j of `matrix` is input inputs[j], or 0.
constexpr uint32_t kNoInput = 0xffffffff;
struct GatheredTerm {
  std::vector<uint32_t> inputs;
  const Matrix* matrix;  // [out_features][inputs], terms of codes only
};

struct Matrix {
  size_t out_features = 0;
  size_t in_features = 0;
  std::vector<CodeTerm> codes;
  std::vector<FloatTerm> floats;
  std::vector<SparseTerm> sparse;
  std::vector<ColumnsTerm> columns;
  std::vector<EntriesTerm> entries;
  std::vector<LowRankTerm> low_rank;
  std::vector<RowsTerm> rows;
  std::vector<GatheredTerm> gathered;  // at most one; then there are no codes, floats, sparse codes and rows
  size_t densified = 0;                // sparse terms at the end of `codes`, where no kernel reads masks
  std::vector<uint32_t> excluded;      // inputs that are 0 for codes, ascending
  // Terms that side_terms.cc adds after codes and plain floats.
  bool has_side_terms() const {
    return !sparse.empty() || !columns.empty() || !entries.empty() || !low_rank.empty() || !rows.empty() ||
           !gathered.empty();
  }
  size_t blocks() const { return round_up(out_features, kBlockRows) / kBlockRows; }
  size_t chunks() const { return round_up(in_features, kChunk) / kChunk; }
  size_t bytes() const;  // of weights read by one product
  // Which forms of the activations its terms read.
  bool reads_integers() const { return !codes.empty() || !sparse.empty() || !rows.empty(); }
  bool reads_values() const {
    return !floats.empty() || !columns.empty() || !entries.empty() || !low_rank.empty() || !gathered.empty();
  }
};

// Activations of n tokens in every form that the kernels read. Rows are padded with zeros.
struct Activations {
  size_t tokens = 0;
  size_t in_features = 0;
  size_t padded = 0;              // in_features rounded up to a chunk
  int limbs = 1;                  // 1: int8; 2: 128 * high + low
  size_t groups = 0;              // activation groups per token
  const float* values = nullptr;  // [tokens][in_features], the float input
  int8_t* high = nullptr;         // [tokens][padded]
  int8_t* low = nullptr;          // [tokens][padded], limbs == 2 only
  float* scales = nullptr;        // [tokens][groups]
  int32_t* sums = nullptr;        // [tokens][padded / 16 + 1], prefix sums of the integers
  // Inputs that were taken as 0 when the integers were made, ascending; null: none.
  const std::vector<uint32_t>* excluded = nullptr;
  // The integers are those of values[token * value_stride + (*gathered)[k]]; null: of k itself.
  const std::vector<uint32_t>* gathered = nullptr;
  size_t value_stride = 0;  // in_features, if nothing is gathered
  // For one token: which widths of codes it meets by table lookup (1 << bits), and the tables of planes of 1
  // and of 2 bits that these need.
  unsigned table_widths = 0;
  const uint8_t* tables[2] = {nullptr, nullptr};
};

// Memory for Activations of up to `tokens` rows; grows, never shrinks.
class ActivationBuffer {
 public:
  // Lays out `tokens` rows over the buffer. The returned struct is valid until the next call.
  Activations prepare(size_t tokens, size_t in_features, int limbs, const float* values);

 private:
  std::unique_ptr<uint8_t[]> memory_;
  size_t capacity_ = 0;
};

}  // namespace lowbit
