// One token by table lookup: see table.cc.
#pragma once

#include "gemv.h"

namespace lowbit::LOWBIT_ISA {

// Writes the tables of the one token of `a` for planes of `width` 1 or 2 bits: plane_table_bytes(), aligned
// to 64.
void build_tables(const Activations& a, int width, uint8_t* tables);
// What segment_sums() finds, from Operands::tables. Preconditions: has_table(term), and no segment ends
// within a chunk, which group sizes of multiples of 32 see to.
SegmentSums table_sums(const CodeTerm& term, int limbs);

}  // namespace lowbit::LOWBIT_ISA
