// GGUF tensors to kernel order: the same codes, scales and offsets, nothing rounded.
// Defined by model/gguf_matrix.py and packed/layout.py, which give the same result slowly.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

// What a ggml tensor type consists of. Weight = scale * level of a code + offset, where scale and offset are
// those of a group or, with factors, of a block times a factor of the group.
struct BlockType {
  int number;             // of ggml's enum ggml_type
  size_t weights;         // in one block
  size_t bytes;           // of one block
  int bits;               // of a code
  size_t group;           // weights that share a scale, or a factor
  size_t scale_bytes;     // 2: bits of fp16, 1: e8m0 or e4m3
  bool factors, offsets;  // whether there are any; offsets are fp16
  size_t members = 0;     // of the grid that codes come from, and the magnitudes in each
  size_t width = 0;
  constexpr size_t scales() const { return factors ? 1 : weights / group; }  // in one block
};

// The type with this number, or null where repack does not know it.
const BlockType* find_block_type(int number);

// What repack writes. Padded rows get zeros, or in base 3 its padding.
struct Repacked {
  uint8_t* codes;          // [blocks][chunks][2][64 * bits], or in base 3 [blocks][vectors][2][64]
  bool base3;              // of types with 2 bits; every code is below 3
  void* scales;            // [blocks][columns / group][32]; with factors [blocks][columns / weights][32]
  uint16_t* offsets;       // likewise, or null for a type without them
  int8_t* factors;         // [blocks][columns / group][32], or null
  int8_t* offset_factors;  // likewise, or null
};

// Repacks `rows` x `columns` weights on all threads of team().
// raw: rows of columns / type.weights blocks. order: row r of the result is row order[r] of raw; null: as is.
// grid: [members][width] magnitudes of a type that has a grid.
// Preconditions: columns is a multiple of type.weights; every order[r] < rows.
void repack(const BlockType& type, const uint8_t* raw, size_t rows, size_t columns, const int64_t* order,
            const uint8_t* grid, const Repacked& out);

// Plain floats of 2 or 4 bytes, [rows][columns] to [blocks][columns][32], padded rows zero.
void transpose_values(const void* values, size_t item_bytes, size_t rows, size_t columns,
                      const int64_t* order, void* packed);

}  // namespace lowbit
