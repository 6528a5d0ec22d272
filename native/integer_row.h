// Where the integers of one row of activations go.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

// The row of one token of Activations (matrix.h).
struct IntegerRow {
  size_t padded;  // integers, a multiple of 32; zeros beyond the row
  int8_t* high;   // [padded]
  int8_t* low;    // [padded], or null: one limb
  float* scales;  // [groups of 64]
  int32_t* sums;  // [padded / 16 + 1], prefix sums
};

}  // namespace lowbit
