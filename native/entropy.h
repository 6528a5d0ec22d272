// bfloat16 with coded exponents, losslessly: 8 bits of sign and mantissa, 3 bits that name one of the
// matrix's 7 most frequent exponents, and for the others 4 bits that name one of the next 15. Byte order in
// docs/formats.md, kind "entropy". Idea of coding the exponents: DFloat11, arXiv:2504.11651; the code here is
// not a Huffman code, because a vector of 64 weights has to be decoded at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace lowbit {

constexpr size_t kEntropyInputs = 4;             // of one record: two vectors of 2 inputs x 32 rows
constexpr size_t kEntropyRecord = 2 * 24 + 128;  // 3 bit-planes of each vector, then signs and mantissas
constexpr size_t kEntropyDirect = 7;             // exponents with a 3-bit code of their own; code 7 escapes
constexpr size_t kEntropyExponents = 22;         // those and the 15 of the escapes; escape 15: one byte more
constexpr size_t kEntropyTail = 64;  // zero bytes behind the escapes, so that vectors may be loaded

// Pointers into memory that somebody else owns.
struct EntropyCode {
  const uint8_t* codes = nullptr;  // [blocks][records][kEntropyRecord]
  const uint8_t* escapes =
      nullptr;  // per block: nibbles of even and odd vectors in parallel, then whole bytes
  const uint32_t* offsets = nullptr;   // [2 * blocks + 1]: where a block's nibbles and its bytes begin
  const uint8_t* exponents = nullptr;  // [kEntropyExponents]
};

inline size_t entropy_records(size_t in_features) {
  return (in_features + kEntropyInputs - 1) / kEntropyInputs;
}

// Bytes that one product reads.
inline size_t entropy_bytes(const EntropyCode& code, size_t blocks, size_t in_features) {
  return blocks * entropy_records(in_features) * kEntropyRecord + code.offsets[2 * blocks];
}

struct EntropyArrays {
  std::vector<uint8_t> codes, escapes, exponents;
  std::vector<uint32_t> offsets;
};

// Codes values[out_features][in_features], the bits of bfloat16. Every pattern is kept.
EntropyArrays entropy_encode(const uint16_t* values, size_t out_features, size_t in_features);

// Empty if kernels can read the code safely, else what is wrong with it. `escapes` counts the tail.
std::string entropy_error(const EntropyCode& code, size_t blocks, size_t in_features, size_t escapes);

// out[0 .. in_features) = the weights of a row, as the bits of bfloat16. Precondition: entropy_error is
// empty.
void entropy_row(const EntropyCode& code, size_t in_features, size_t row, uint16_t* out);

// The same for the first `rows` rows of a block, out[rows][in_features].
void entropy_block(const EntropyCode& code, size_t in_features, size_t block, size_t rows, uint16_t* out);

}  // namespace lowbit
