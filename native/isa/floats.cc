// Products with plain float weights.
#include "floats.h"

namespace lowbit::LOWBIT_ISA {
namespace {

// One running sum per output over all inputs in order: the same order for one token and for many.
template <size_t blocks, size_t columns, Number type>
LOWBIT_INLINE void float_tile(const FloatTerm& t, size_t block, const Activations& a, size_t first,
                              float* acc, size_t block_stride) {
  const size_t n = a.in_features;
  const float* x = a.values + first * n;
  F32 f[blocks][columns][2];
  for (size_t b = 0; b < blocks; ++b)
    for (size_t c = 0; c < columns; ++c)
      for (size_t tile = 0; tile < 2; ++tile)
        f[b][c][tile] = load(acc + b * block_stride + c * kBlockRows + tile * kTileRows);
  for (size_t k = 0; k < n; ++k) {
    for (size_t b = 0; b < blocks; ++b) {
      const size_t index = ((block + b) * n + k) * kBlockRows;
      const F32 w0 = load_number(type, t.values, index), w1 = load_number(type, t.values, index + kTileRows);
      for (size_t c = 0; c < columns; ++c) {
        const F32 v = set1(x[c * n + k]);
        f[b][c][0] = fma(w0, v, f[b][c][0]);
        f[b][c][1] = fma(w1, v, f[b][c][1]);
      }
    }
  }
  for (size_t b = 0; b < blocks; ++b)
    for (size_t c = 0; c < columns; ++c)
      for (size_t tile = 0; tile < 2; ++tile)
        store(acc + b * block_stride + c * kBlockRows + tile * kTileRows, f[b][c][tile]);
}

template <Number type>
void float_typed(const FloatTerm& t, size_t block, size_t blocks, const Activations& a, size_t first,
                 size_t count, float* acc) {
  constexpr size_t wide = kGemmColumns;
  const size_t stride = count * kBlockRows;
  if (count == 1 && blocks == kFloatBlocks)
    return float_tile<kFloatBlocks, 1, type>(t, block, a, first, acc, stride);
  for (size_t b = 0; b < blocks; ++b, acc += stride) {
    size_t c = 0;
    for (; c + wide <= count; c += wide)
      float_tile<1, wide, type>(t, block + b, a, first + c, acc + c * kBlockRows, 0);
    for (; c < count; ++c) float_tile<1, 1, type>(t, block + b, a, first + c, acc + c * kBlockRows, 0);
  }
}

}  // namespace

void float_product(const FloatTerm& t, size_t block, size_t blocks, const Activations& a, size_t first,
                   size_t count, float* acc) {
  if (t.type == Number::fp32) return float_typed<Number::fp32>(t, block, blocks, a, first, count, acc);
  if (t.type == Number::bf16) return float_typed<Number::bf16>(t, block, blocks, a, first, count, acc);
  return float_typed<Number::fp16>(t, block, blocks, a, first, count, acc);
}

}  // namespace lowbit::LOWBIT_ISA
