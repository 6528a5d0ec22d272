// Packing codes into the kernel order of docs/formats.md and back. Defined by packed/layout.py and base3.py.
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

// Base-3 packing: five steps of ternary codes in one vector of 64 bytes.
constexpr size_t kBase3Steps = 5;
constexpr size_t kBase3Inputs = 4 * kBase3Steps;
constexpr uint8_t kBase3Padding = 1;  // code of padded rows and inputs

// steps[5][64] holds one code per byte, as for pack_tile; writes 64 bytes.
void pack_base3_vector(const uint8_t* steps, uint8_t* packed);

// codes [rows][columns] to packed [blocks][vectors][2][64] and back, on all threads of team(). A byte above
// 242, which packing never writes, unpacks to a fourth code of 3.
// Precondition of packing: every code below 3.
void pack_base3(const uint8_t* codes, size_t rows, size_t columns, uint8_t* packed);
void unpack_base3(const uint8_t* packed, size_t rows, size_t columns, uint8_t* codes);

}  // namespace lowbit
