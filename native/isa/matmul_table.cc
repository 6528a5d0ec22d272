// Activations to integers, products with float weights, and this instruction set's table of kernels.
#include "gemv.h"
#include "matmul_kernels.h"

namespace lowbit::LOWBIT_ISA {

void gemm(const CodeTerm& t, size_t block, const uint8_t* panel, const Activations& a, size_t first,
          size_t count, float* acc);

namespace {

// x[i .. i + 16) with zeros from n on.
LOWBIT_INLINE F32 load_tail(const float* x, size_t i, size_t n) {
  if (i + 16 <= n) return load(x + i);
  return i < n ? load_n(x + i, n - i) : zero_f32();
}

void quantize_row(const float* x, size_t n, size_t padded, int limbs, int8_t* high, int8_t* low,
                  float* scales, int32_t* sums) {
  const float top = limbs == 2 ? static_cast<float>(kLimbMax) : 127.0f;
  int32_t sum = 0;
  *sums++ = 0;
  for (size_t g = 0; g < padded; g += kActivationGroup) {
    const size_t end = g + kActivationGroup < padded ? g + kActivationGroup : padded;
    F32 peak = zero_f32(), poison = zero_f32();  // max() drops a NaN, 0 * x keeps it
    for (size_t i = g; i < end; i += 16) {
      const F32 v = load_tail(x, i, n);
      peak = max(peak, abs(v));
      poison = fma(v, zero_f32(), poison);
    }
    const float amax = reduce_max(peak) + reduce_add(poison);
    *scales++ = amax / top;
    // A group of zeros, or one so small that the reciprocal overflows, becomes zeros.
    const F32 inverse = set1(amax > 1e-30f ? top / amax : 0.0f);
    for (size_t i = g; i < end; i += 16) {
      const F32 v = round_even(mul(load_tail(x, i, n), inverse));
      if (limbs == 2) {
        const F32 h = floor(mul(add(v, set1(64.0f)), set1(1.0f / kLimbBase)));
        store_i8(high + i, to_i32(h));
        store_i8(low + i, to_i32(fma(h, set1(-static_cast<float>(kLimbBase)), v)));
      } else {
        store_i8(high + i, to_i32(v));
      }
      sum += static_cast<int32_t>(reduce_add(v));  // exact: 16 * 16256 < 2^24
      *sums++ = sum;
    }
  }
}

void gemv_any(const CodeTerm& t, size_t block, const Activations& a, size_t token, float* acc) {
  code_kernels(t, a.limbs).gemv(t, block, a, token, acc);
}

void unpack_any(const CodeTerm& t, size_t block, size_t chunks, uint8_t* panel) {
  code_kernels(t, 1).unpack(t, block, chunks, panel);
}

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
  if (count == 1 && blocks == 4) return float_tile<4, 1, type>(t, block, a, first, acc, stride);
  for (size_t b = 0; b < blocks; ++b, acc += stride) {
    size_t c = 0;
    for (; c + wide <= count; c += wide)
      float_tile<1, wide, type>(t, block + b, a, first + c, acc + c * kBlockRows, 0);
    for (; c < count; ++c) float_tile<1, 1, type>(t, block + b, a, first + c, acc + c * kBlockRows, 0);
  }
}

void float_product(const FloatTerm& t, size_t block, size_t blocks, const Activations& a, size_t first,
                   size_t count, float* acc) {
  if (t.type == Number::fp32) return float_typed<Number::fp32>(t, block, blocks, a, first, count, acc);
  if (t.type == Number::bf16) return float_typed<Number::bf16>(t, block, blocks, a, first, count, acc);
  return float_typed<Number::fp16>(t, block, blocks, a, first, count, acc);
}

constexpr size_t kReadAhead = 4096;  // as the products do: see gemv.cc

uint64_t read_memory(const uint8_t* p, size_t bytes) {
  U8 a = load_u8(p), b = a, c = a, d = a;
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    for (size_t line = 0; line < 256; line += 64) __builtin_prefetch(p + i + kReadAhead + line, 0, 3);
    a = or_(a, load_u8(p + i));
    b = or_(b, load_u8(p + i + 64));
    c = or_(c, load_u8(p + i + 128));
    d = or_(d, load_u8(p + i + 192));
  }
  uint8_t out[64];
  store_u8(out, or_(or_(a, b), or_(c, d)));
  uint64_t sum = 0;
  for (uint8_t byte : out) sum += byte;
  return sum;
}

constexpr size_t kChains = 12;  // independent sums, enough to hide the latency of a dot product

int64_t dot_rounds(size_t rounds) {
  alignas(64) uint8_t w[64];
  alignas(64) int8_t x[4 * kChains];
  for (int i = 0; i < 64; ++i) w[i] = static_cast<uint8_t>(i);
  for (size_t i = 0; i < sizeof x; ++i) x[i] = static_cast<int8_t>(i);
  I32 acc[kChains];
  I32 operand[kChains];
  for (size_t c = 0; c < kChains; ++c) acc[c] = zero_i32(), operand[c] = broadcast4(x + 4 * c);
  U8 weights = load_u8(w);
  for (size_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (size_t c = 0; c < kChains; ++c) acc[c] = dot4(acc[c], weights, operand[c]);
  }
  int32_t out[16];
  int64_t sum = 0;
  for (I32& a : acc) {
    store_i32(out, a);
    for (int32_t lane : out) sum += lane;
  }
  return sum;
}

}  // namespace

MatmulKernels make_matmul_kernels();
MatmulKernels make_matmul_kernels() {
  return {quantize_row, gemv_any, unpack_any, gemm, float_product, 4, read_memory, dot_rounds, kChains * 64};
}

}  // namespace lowbit::LOWBIT_ISA
