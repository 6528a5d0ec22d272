// Activations to integers, and this instruction set's table of kernels.
#include "floats.h"
#include "decode.h"
#include "matmul_kernels.h"
#include "quantize.h"

namespace lowbit::LOWBIT_ISA {

void gemv(const CodeTerm& t, size_t block, size_t blocks, const Activations& a, size_t token, float* acc,
          uint8_t* scratch);
void build_tables(const Activations& a, int width, uint8_t* tables);
void few(const CodeTerm& t, size_t block, size_t blocks, const Activations& a, float* acc, uint8_t* scratch);
void unpack_panel(const CodeTerm& t, size_t block, size_t chunks, uint8_t* memory);
void gemm(const CodeTerm& t, const uint8_t* memory, const Activations& a, size_t first, size_t count,
          float* out, size_t stride, bool fresh);

namespace {

void quantize_row(const float* x, size_t n, const IntegerRow& row) {
  Peak peak;
  for (size_t g = 0; g * kActivationGroup < row.padded; ++g) {
    for (size_t i = g * kActivationGroup; i < n && i < (g + 1) * kActivationGroup; i += 16)
      peak.see(load_tail(x, i, n));
    row.scales[g] = peak.close();
  }
  round_row(x, n, row, peak.poison);
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

// Independent sums, enough to hide the latency of a dot product (ten cycles' worth of two a cycle) and few
// enough for the registers: AVX2 has 16 of half the size.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr size_t kChains = 4;
#else
constexpr size_t kChains = 12;
#endif

int64_t dot_rounds(size_t rounds) {
  // Runs of eight rounds of four-bit weights, which AVX2 can add in int16. Weights change from round to
  // round, so that no product of AVX2's leaves the loop; a run at a time keeps the sums where they are
  // instead of copying them at each turn.
  constexpr size_t kRun = fitting_steps(15), kWeights = 8 * kRun;
  alignas(64) uint8_t w[kWeights * 64];
  alignas(64) int8_t x[4 * kChains];
  for (size_t i = 0; i < sizeof w; ++i) w[i] = static_cast<uint8_t>(3 * i % 16);
  for (size_t i = 0; i < sizeof x; ++i) x[i] = static_cast<int8_t>(i);
  I32 acc[kChains], operand[kChains];
  unroll<kChains>([&](auto c) {
    acc[c] = zero_i32();
    operand[c] = broadcast4(x + 4 * c);
  });
  for (size_t r = 0; r < rounds; r += kRun) {
    const uint8_t* at = w + r % kWeights * 64;
    Run run[kChains];
    unroll<kChains>([&](auto c) { run[c] = begin_run(acc[c]); });
    unroll<kRun>([&](auto round) {
      const U8 weights = load_u8(at + round * 64);
      unroll<kChains>([&](auto c) { run[c] = dot_run(run[c], weights, operand[c]); });
    });
    unroll<kChains>([&](auto c) { acc[c] = end_run(acc[c], run[c]); });
  }
  int64_t sum = 0;
  unroll<kChains>([&](auto c) {
    int32_t out[16];
    store_i32(out, acc[c]);
    for (int32_t lane : out) sum += lane;
  });
  return sum;
}

float fma_rounds(size_t rounds) {
  F32 acc[kChains];
  for (size_t c = 0; c < kChains; ++c) acc[c] = set1(static_cast<float>(c));
  const F32 factor = set1(0.5f), term = set1(1.0f);  // tends to 2: no sum becomes infinite or denormal
  for (size_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (size_t c = 0; c < kChains; ++c) acc[c] = fma(acc[c], factor, term);
  }
  float sum = 0;
  for (F32& a : acc) sum += reduce_add(a);
  return sum;
}

}  // namespace

MatmulKernels make_matmul_kernels();
MatmulKernels make_matmul_kernels() {
  return {quantize_row,  gemv,        build_tables, few,          unpack_panel, gemm,
          float_product, read_memory, dot_rounds,   kChains * 64, fma_rounds,   kChains * 16};
}

}  // namespace lowbit::LOWBIT_ISA
