// Packing codes into the kernel order of docs/formats.md and back. Defined by packed/layout.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

// Packs one tile: steps[8][64] holds one code per byte, byte 4 * row + j of step s for input 4 * s + j.
// Writes 64 * bits bytes: the planes of the code, widest first, lowest bits first.
void pack_tile(const uint8_t* steps, int bits, uint8_t* packed);
// The inverse of pack_tile.
void unpack_tile(const uint8_t* packed, int bits, uint8_t* steps);

// codes [rows][columns] to packed [blocks][chunks][2][64 * bits] and back, on all threads of team().
// Preconditions: bits in 1..8; every code below 1 << bits.
void pack_codes(const uint8_t* codes, size_t rows, size_t columns, int bits, uint8_t* packed);
void unpack_codes(const uint8_t* packed, size_t rows, size_t columns, int bits, uint8_t* codes);

}  // namespace lowbit
