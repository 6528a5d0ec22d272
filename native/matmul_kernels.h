// The functions of a matrix product that are compiled once per instruction set.
#pragma once

#include "integer_row.h"
#include "matrix.h"

namespace lowbit {

// Whether codes of this term can be decoded in registers for one token; the others are unpacked.
inline bool has_gemv(const CodeTerm& t) { return !t.multipliers || (t.map == Map::linear && t.bits <= 4); }

// Memory for the scales and offsets of a block as floats and for the list of its segments.
constexpr size_t kSegmentBytes = 64;
inline size_t float_scale_bytes(const CodeTerm& t) {
  return t.groups * kBlockRows * sizeof(float) * (t.offsets ? 2 : 1);
}
inline size_t gemv_scratch_bytes(const CodeTerm& t, size_t padded) {
  return float_scale_bytes(t) + padded / kSumStride * kSegmentBytes;
}

// Whether `few` covers this term: levels that are linear or bytes of one table.
inline bool has_few(const CodeTerm& t) {
  return !t.selectors && !t.multipliers && t.map != Map::table2 && t.group_size % kChunk == 0;
}

// Memory of `few`: scales and offsets of a block as floats, the segments, what their sums start from for each
// token, and the planes of a block of base-3 codes.
inline size_t few_scratch_bytes(const CodeTerm& t, size_t padded, size_t tokens) {
  const size_t segments = padded / kChunk;
  const size_t planes = t.base3 ? segments * 2 * 128 : 0;
  return float_scale_bytes(t) + segments * kSegmentBytes + planes +
         round_up(segments * tokens * sizeof(int32_t), 64);
}

// Whether codes of this term can be met by table lookup: see isa/table.cc.
inline bool has_table(const CodeTerm& t) {
  return t.bits <= 3 && t.map == Map::linear && !t.base3 && !t.multipliers &&
         (t.groups == 1 || t.group_size % kChunk == 0);
}

// Tables of one token for planes of `width` 1 or 2 bits, for each limb: int32 [chunks], the sum of each
// chunk's smallest entries, up to a multiple of 64 bytes, then [chunks][vectors][2 nibbles][low, high][4
// inputs][16].
constexpr size_t kNibbleTableBytes = 2 * 4 * 16;
inline size_t lowest_bytes(size_t chunks) { return round_up(chunks * sizeof(int32_t), 64); }
inline size_t limb_table_bytes(size_t chunks, size_t width) {
  return lowest_bytes(chunks) + chunks * width * 2 * kNibbleTableBytes;
}
inline size_t plane_table_bytes(const Activations& a, size_t width) {
  return static_cast<size_t>(a.limbs) * limb_table_bytes(a.padded / kChunk, width);
}

struct MatmulKernels {
  // Quantizes one row of n floats. See matmul.h.
  void (*quantize_row)(const float* x, size_t n, const IntegerRow& row);
  // acc[block][32] += `blocks` consecutive blocks of a code term times one token, decoded in registers.
  // Precondition: has_gemv(term). `scratch` has gemv_scratch_bytes(), 64-byte aligned.
  void (*gemv)(const CodeTerm& term, size_t block, size_t blocks, const Activations& a, size_t token,
               float* acc, uint8_t* scratch);
  // Tables of the only token for planes of `width` 1 or 2 bits: plane_table_bytes(), aligned to 64.
  void (*build_tables)(const Activations& a, int width, uint8_t* tables);
  // acc[block][token][32] += `blocks` consecutive blocks of a code term times all tokens, two or more,
  // decoded in registers once for up to eight of them. Precondition: has_few(term). `scratch` has
  // few_scratch_bytes(), 64-byte aligned.
  void (*few)(const CodeTerm& term, size_t block, size_t blocks, const Activations& a, float* acc,
              uint8_t* scratch);
  // Unpacks one block to a panel (panel.h) in `memory`, which is aligned and has room for it.
  void (*unpack)(const CodeTerm& term, size_t block, size_t chunks, uint8_t* memory);
  // out[token * stride + row] += an unpacked block times `count` tokens from `first`, 32 rows; `fresh`: =
  // instead.
  void (*gemm)(const CodeTerm& term, const uint8_t* memory, const Activations& a, size_t first, size_t count,
               float* out, size_t stride, bool fresh);
  // acc[token][32] += one block of a float term times `count` tokens from `first`.
  void (*float_product)(const FloatTerm& term, size_t block, const Activations& a, size_t first, size_t count,
                        float* acc);
  // Sums `bytes` of memory (bandwidth), and runs `rounds` rounds of 64-byte dot products (peak); both return
  // something that depends on all the work.
  uint64_t (*read_memory)(const uint8_t* p, size_t bytes);
  int64_t (*dot_rounds)(size_t rounds);
  size_t dots_per_round;  // int8 multiply-adds in a round
  // The same with fused multiply-adds of float32: the peak of products with float weights.
  float (*fma_rounds)(size_t rounds);
  size_t fmas_per_round;
};

// The table of the active instruction set.
const MatmulKernels& matmul_kernels();

}  // namespace lowbit
