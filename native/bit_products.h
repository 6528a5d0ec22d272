// Products of many tokens with matrices whose codes all have one bit (binary-coded planes among them): sums
// of four activations are looked up, not multiplied (isa/bits.cc). Results are those of the other kernels.
#pragma once

#include "matmul.h"

namespace lowbit {

// Tokens of a tile, and inputs whose tables are made at a time: those of four tokens take 16 KB, so that they
// stay in the first-level cache while all blocks pass by.
constexpr size_t kBitTokens = 4, kBitSlice = 512;

// What a token's tables take: two for each 16 inputs, and for each segment of 64 what its sums start from and
// its scale.
struct BitTable {
  static constexpr size_t kTables = kBitSlice / kSumStride, kSegments = kBitSlice / kActivationGroup;
  alignas(64) uint8_t low[kTables][64], high[kTables][64];
  int32_t starts[kSegments];
  float scales[kSegments];
};

struct BitKernels {
  // Inputs [k, end) of a token, both multiples of 64; null where the instruction set has no such lookups.
  void (*make_table)(const CodeTerm& term, const Activations& a, size_t token, size_t k, size_t end,
                     BitTable* table);
  // acc[token][32] += those inputs of a block times the `count` <= kBitTokens tokens of `tables`.
  void (*multiply)(const CodeTerm& term, size_t block, size_t chunks, size_t k, size_t end,
                   const BitTable* tables, size_t count, float* acc);
};

// Whether `blocks` blocks of a matrix go this way.
bool takes_bits(const Matrix& m, size_t blocks, size_t tokens, int limbs);

// Blocks [block, stop) of a product.
void bit_products(const Product& p, size_t block, size_t stop, const Activations& a, MatmulScratch& scratch);

}  // namespace lowbit
