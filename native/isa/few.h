// Several tokens times a block of codes: the two halves of few.cc.
#pragma once

#include "decode.h"

namespace lowbit::LOWBIT_ISA {

// A run of inputs [k, end) that share the weights' and the activations' scales: whole chunks within 64.
struct Span {
  size_t k, end, group;
  bool first, last;  // of a run of segments, see Runs
};

// What a tile of tokens multiplies: one limb of their activations.
struct Columns {
  const uint8_t* codes;  // of the block, in planes
  const int8_t* x;       // of the first token, the others `stride` bytes apart
  size_t stride, count;
  const int32_t* starts;  // [span][count], added to every sum (of the low limb where there are two)
  // Lines to fetch with each chunk, of the block that follows; null: this block's own codes are fetched
  // ahead.
  const uint8_t* ahead;
  size_t lines;
  const int8_t* low;  // paired_sums() only: the low limb where x is the high one
};

// Where sums go at the end of a segment of a plain term with one limb of activations.
struct Totals {
  bool weights_outer;        // see Runs
  const float* scales;       // of the block, [group][32]
  const float* activations;  // the first token's scales, those of the others `groups` apart
  size_t groups;
  float* f;    // [column][32]
  float* run;  // [column][32], the runs that are open
};

// The integer sums of `count` spans: sums[span][column][tile]. Or, where kFinishes, with null `sums`: added
// to `totals`.
using ColumnSums = void (*)(const CodeTerm& t, const Columns& c, const Span* spans, size_t count, I32* sums,
                            const Totals& totals);
// The widest tile: where sums stay in registers, wider ones are no faster (8.9 cycles for a column and 32
// inputs with 8 columns, 9.0 with 12); elsewhere what is unpacked once should serve many.
#if defined(LOWBIT_ISA_avx512)
constexpr bool kFinishes = true;
constexpr size_t kMostColumns = 8;
#else
constexpr bool kFinishes = false;
constexpr size_t kMostColumns = 32;
#endif
// Precondition: 2 <= columns <= kMostColumns.
ColumnSums column_sums(const CodeTerm& t, size_t columns);
// The same for both limbs of 2 to kMostPaired tokens of a plain term at once, added to `totals`.
constexpr size_t kMostPaired = kMostColumns / 2;
ColumnSums paired_sums(const CodeTerm& t, size_t tokens);

// A block of base-3 codes as planes of two bits: [chunks][2][128].
void base3_planes(const CodeTerm& t, const uint8_t* codes, size_t chunks, uint8_t* planes);

}  // namespace lowbit::LOWBIT_ISA
