// Products of quantized matrices with activations, called by every member of a team together.
#pragma once

#include "integer_row.h"
#include "matrix.h"
#include "team.h"

namespace lowbit {

// Quantizes rows [first, last) of a.values into a's integer form. Needs no barrier inside; the caller
// shares the rows out and puts a barrier before the first product.
// Inputs in a.excluded count as 0; with a.gathered they are taken in that order. Per token and group of 64:
// scale = amax / 127 (or / 16256), integer = round to even(value / scale).
void quantize_rows(const Activations& a, size_t first, size_t last);
// Where the integers of one token go, for whoever makes them while it makes the floats.
IntegerRow integer_row(const Activations& a, size_t token);

// One matrix of a product and where its result goes: out[token * stride + row], rows below out_features.
struct Product {
  const Matrix* matrix;
  float* out;
  size_t stride;
};

// out = matrix * activations for several matrices that read the same activations (QKV, gate and up).
// Every member of the team calls this with equal arguments; the work is shared out among them and no
// barrier stands at the end: the caller puts one before it reads `out`.
// A result depends on the matrix and on its own token's row only: not on the other tokens, on the number
// of threads or on the split. `scratch` is per member and grows as needed.
// Codes whose matrix excludes other inputs than `a` does are multiplied with activations rounded anew. That
// and the terms of side_terms.cc take barriers inside; products without them take none.
class MatmulScratch;
void matmul(const Member& member, const Product* products, size_t count, const Activations& a,
            MatmulScratch& scratch);

// The terms of codes and plain floats alone, with the activations as they are.
void plain_products(const Member& member, const Product* products, size_t count, const Activations& a,
                    MatmulScratch& scratch);

// Products that each read activations of their own, of as many inputs: the experts of a layer. Shared out
// over the team by what they cost, otherwise as matmul().
struct Job {
  Product product;
  Activations activations;
};
void matmul(const Member& member, const Job* jobs, size_t count, MatmulScratch& scratch);
void plain_jobs(const Member& member, const Job* jobs, size_t count, MatmulScratch& scratch);

class MatmulScratch {
 public:
  uint8_t* get(size_t bytes);  // 64-byte aligned

 private:
  std::unique_ptr<uint8_t[]> memory_;
  size_t capacity_ = 0;
};

// The inputs that quantize_rows should take as 0 for these products: the list that all matrices with codes
// agree on, or null.
const std::vector<uint32_t>* common_exclusion(const Product* products, size_t count);

// out[0 .. in_features) = row `row` of the matrix in float32 (embedding lookup).
void dequantize_row(const Matrix& m, size_t row, float* out);
// Element `index` of an array of numbers.
float number_at(Number type, const void* base, size_t index);

}  // namespace lowbit
