// Terms beside codes and plain floats, as the rest of the library sees them.
#pragma once

#include "matrix.h"

namespace lowbit {

// out[0 .. in_features) += row `row` of the sparse terms, or of all other terms beside codes and floats.
void add_sparse_row(const Matrix& m, size_t row, float* out);
void add_side_row(const Matrix& m, size_t row, float* out);

// Blocks [first, last) of a sparse term as dense codes of `bits` bits, [blocks][chunks][2][64 * bits].
void densify(const SparseTerm& s, size_t chunks, int bits, size_t first, size_t last, uint8_t* codes);

// Stored bytes of all these terms.
size_t side_bytes(const Matrix& m);

}  // namespace lowbit
