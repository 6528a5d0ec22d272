// Round-to-nearest of a weight matrix into packed codes and scales. quantize/search.py and
// quantize/affine.py define the result; every instruction set gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "matrix.h"

namespace lowbit {

constexpr size_t kChainLevels = 16;  // up to here all boundaries are compared, above a table is used
constexpr int kLookupShift = 19;     // a lookup by sign, exponent and 4 bits of mantissa
constexpr size_t kLookupSize = 1u << 13;
constexpr size_t kMaxCombinations = 256;  // of the levels of all planes
constexpr size_t kGroupVectors = 7;       // of 16 floats for each group that shares a scale with others

// The levels of one table; see Grid in quantize/grid.py.
struct LevelTable {
  size_t count;
  bool linear;  // level of code c = step * (first + c); otherwise step is 1
  float step, first;
  const float* levels;      // [count], ascending
  const float* boundaries;  // [count - 1]
  const uint8_t* codes;     // [count], the code of each level
  float top_inverse, bottom_inverse;
  int top_exponent;                 // of the largest level, as frexp gives it
  float lower_normal, lower_cover;  // lower bounds of the candidates, in units of rms and covering scale
  int roots;                        // 2^roots + 1 candidates for each sign
  bool both_signs;                  // negative scales are worth trying
  std::vector<uint8_t> lookup;      // count > kChainLevels: boundaries below the first number of each bucket
};

struct RtnJob {
  const float* weights;  // [rows][columns], finite
  const float* counts;   // [columns], times which a squared error in each counts in the search; null: 1
  size_t rows, columns;
  size_t group_size, groups;  // group_size * groups == columns
  size_t together;            // neighbouring groups that share a scale; 1 without multipliers
  float divisor;              // the scale of the tensor
  int bits;
  bool base3;                      // five ternary codes to a byte; bits is 2
  Number scale_type;               // fp16, fp32, e8m0, e4m3
  size_t planes;                   // terms of one level table, fitted together; 1: round to nearest
  size_t plane_codes;              // bytes of codes of one plane, which follow one another, as scales do
  const float* digits;             // [planes] scales to start from, over the largest magnitude; planes > 1
  bool mse;                        // least squares; false: the min-max scale
  bool weigh;                      // large weights count more in it
  bool affine;                     // asymmetric integers; tables[0] has lower_normal, lower_cover and count
  bool mean_start;                 // the min-max scale is the mean magnitude
  std::vector<LevelTable> tables;  // 1, or up to 4 with selectors
  // Outputs, filled with padding beforehand: zeros, or bytes of code 1 in base 3. Layout as in matrix.h.
  uint8_t* codes;
  void* scales;
  uint8_t* zero_points;  // affine only
  uint8_t* selectors;    // several tables only
  uint8_t* multipliers;  // m4 scales only: [blocks][groups][16], two to a byte; scale_type is fp16
  // Sums over each block, [blocks]: squared errors and squared weights, both over divisor^2.
  double* errors;
  double* squares;
};

// Quantizes the matrix on all threads of team(). Returns the two sums.
struct RtnSums {
  double error, square;
};
RtnSums round_to_nearest(RtnJob& job);

// Largest magnitude of n floats, as the bits of a float: 0x7f800000 and above if one is infinite or NaN.
uint32_t largest_magnitude_bits(const float* x, size_t n);

// Bytes of scratch that one tile needs, and the kernel of one tile of 16 rows (isa/rtn.cc).
size_t rtn_scratch_bytes(const RtnJob& job);
// Floats of it that describe the groups which share a scale, or the planes of one group.
inline size_t rtn_group_floats(const RtnJob& job) {
  if (job.planes > 1) return kTileRows * (3 * job.group_size + kMaxCombinations);
  return kTileRows * kGroupVectors * job.together;
}
using RtnTile = void (*)(const RtnJob& job, size_t block, size_t tile, uint8_t* scratch);

}  // namespace lowbit
