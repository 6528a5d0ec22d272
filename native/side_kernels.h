// Kernels of the terms that stand beside codes, compiled once per instruction set.
#pragma once

#include "matrix.h"

namespace lowbit {

struct SideKernels {
  // Is there a product of masked codes? If not, sparse terms become dense ones at load.
  bool sparse;
  // acc[0 .. 32) += one block of a sparse term times one token.
  // Precondition: the term's group size is a multiple of 32.
  void (*sparse_gemv)(const SparseTerm& term, size_t block, const Activations& a, size_t token, float* acc);
  // One block as codes of 8 bits in planes: [chunks][2][8 steps][64].
  void (*sparse_expand)(const SparseTerm& term, size_t block, size_t chunks, uint8_t* codes);
  // acc[t][32] += sum over j < count of values[j][32] * x[t * stride + columns[j]], in the order of j.
  // Without columns: of x[t * stride + j].
  void (*add_columns)(const uint16_t* values, const uint32_t* columns, size_t count, const float* x,
                      size_t stride, size_t tokens, float* acc);
  // acc[rows[i]] += values[i] * x[columns[i]] for i in [begin, end), in order.
  void (*add_entries)(const EntriesTerm& term, size_t begin, size_t end, const float* x, float* acc);
  // The same for `width` tokens, a multiple of 16: x[column][width] and acc[32][width].
  void (*add_entries_wide)(const EntriesTerm& term, size_t begin, size_t end, const float* x, size_t width,
                           float* acc);
  // out[t * rank + r] = v[r] . x[t * n] for r in [first, last).
  void (*project)(const LowRankTerm& term, size_t n, const float* x, size_t tokens, size_t first, size_t last,
                  float* out);
};

// The table of the active instruction set.
const SideKernels& side_kernels();

}  // namespace lowbit
