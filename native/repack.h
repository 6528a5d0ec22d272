// GGUF tensors to kernel order: the same codes, scales and offsets, nothing rounded.
// Defined by model/gguf_types.py and packed/layout.py, which give the same result slowly.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

// What a ggml tensor type consists of. Weight = scale * (code + a constant of the type) + offset.
struct BlockType {
  int number;        // of ggml's enum ggml_type
  size_t weights;    // in one block
  size_t bytes;      // of one block
  int bits;          // of a code
  size_t group;      // weights that share a scale
  bool wide_scales;  // scales and offsets are float, not the bits of fp16
  bool has_offsets;
};

// The type with this number, or null where repack does not know it.
const BlockType* find_block_type(int number);

// Repacks `rows` x `columns` weights on all threads of team().
// raw: rows of columns / type.weights blocks. order: row r of the result is row order[r] of raw; null: as is.
// codes [blocks][chunks][2][64 * bits], scales and offsets [blocks][columns / group][32] of float or fp16
// bits; offsets is null for a type without them. Padded rows get zeros.
// Preconditions: columns is a multiple of type.weights; every order[r] < rows.
void repack(const BlockType& type, const uint8_t* raw, size_t rows, size_t columns, const int64_t* order,
            uint8_t* codes, void* scales, void* offsets);

// Plain floats of 2 or 4 bytes, [rows][columns] to [blocks][columns][32], padded rows zero.
void transpose_values(const void* values, size_t item_bytes, size_t rows, size_t columns,
                      const int64_t* order, void* packed);

}  // namespace lowbit
