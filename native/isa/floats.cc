// Products with float weights: one running sum per output over all inputs in order, in float32, with one
// fused multiply-add each. So one token and many give the same bits.
#include "floats.h"

#include <algorithm>

#include "entropy.h"

namespace lowbit::LOWBIT_ISA {
namespace {

// Columns of one register tile (x 32 rows). Their sums fill the registers but for two weights and a
// broadcast: 24 of 32 with AVX-512, 12 of 16 with AVX2, 24 of 32 with NEON.
#ifdef LOWBIT_ISA_avx512
constexpr size_t kColumns = 12;
#else
constexpr size_t kColumns = 3;
#endif

// Inputs of one panel: 32 rows of float32 are 32 KB, about one first-level cache.
constexpr size_t kPanel = 256;
static_assert(kPanel % kEntropyInputs == 0, "a panel ends with a record");

// One token reads a single stream, fetched this far ahead. Several blocks at once would hide the latency of
// the multiply-adds, but only one of them continues where the last ones ended: measured 70 to 80% of the
// bandwidth, against 95 to 100%. Four cycles for two sums are 16 bytes of bf16 a cycle anyway.
constexpr size_t kAhead = 8192;

// Where the weights of a block come from: a reader gives kInputs inputs of 32 rows at a time, in order.
template <Number type>
struct PlainReader {
  static constexpr size_t kInputs = 1;
  const uint8_t* p;
  PlainReader(const FloatTerm& t, size_t block, size_t n)
      : p(static_cast<const uint8_t*>(t.values) + block * n * kBlockRows * number_bytes(type)) {}
  LOWBIT_INLINE void read(F32 (&w)[1][2]) {
    constexpr size_t bytes = type == Number::fp32 ? 128 : 64;
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(p + kAhead + line, 0, 3);
    w[0][0] = load_number(type, p, 0);
    w[0][1] = load_number(type, p, kTileRows);
    p += bytes;
  }
};

// `rare`: the block has escapes of a whole byte.
template <bool rare>
struct CodedReader {
  static constexpr size_t kInputs = kEntropyInputs;
  EntropyReader reader;
  CodedReader(const FloatTerm& t, size_t block, size_t n) : reader(t.entropy, block, entropy_records(n)) {}
  LOWBIT_INLINE void read(F32 (&w)[kInputs][2]) {
    for (size_t line = 0; line < kEntropyRecord; line += 64)
      __builtin_prefetch(reader.position() + kAhead + line, 0, 3);
    reader.template read<rare>(w);
  }
};

template <typename Reader>
void one_token(Reader reader, const float* x, size_t n, float* acc) {
  constexpr size_t inputs = Reader::kInputs;
  F32 f[2] = {load(acc), load(acc + kTileRows)};
  const auto add_input = [&](const F32(&w)[2], float value) LOWBIT_UNROLLED {
    const F32 v = set1(value);
    f[0] = fma(w[0], v, f[0]);
    f[1] = fma(w[1], v, f[1]);
  };
  F32 w[inputs][2];
  size_t k = 0;
  for (; k + inputs <= n; k += inputs) {
    reader.read(w);
    unroll<inputs>([&](auto i) LOWBIT_UNROLLED { add_input(w[i], x[k + i]); });
  }
  if (k < n) {
    reader.read(w);
    for (size_t i = 0; k + i < n; ++i) add_input(w[i], x[k + i]);
  }
  store(acc, f[0]);
  store(acc + kTileRows, f[1]);
}

// acc[column][32] += panel[inputs][32] times x[column * stride .. + inputs).
template <size_t columns>
void tile(const float* panel, size_t inputs, const float* x, size_t stride, float* acc) {
  F32 f[columns][2];
  unroll<columns>([&](auto c) LOWBIT_UNROLLED {
    f[c][0] = load(acc + c * kBlockRows);
    f[c][1] = load(acc + c * kBlockRows + kTileRows);
  });
  // Four columns share a pointer: twelve would not fit the general registers.
  const float* x4 = x + 4 * stride;
  const float* x8 = x + 8 * stride;
  const size_t three = 3 * stride;
  for (size_t k = 0; k < inputs; ++k) {
    const F32 w0 = load(panel), w1 = load(panel + kTileRows);
    unroll<columns>([&](auto c) LOWBIT_UNROLLED {
      const float* p = c < 4 ? x : c < 8 ? x4 : x8;
      const F32 v = set1(p[c % 4 == 0 ? 0 : c % 4 == 1 ? stride : c % 4 == 2 ? 2 * stride : three]);
      f[c][0] = fma(w0, v, f[c][0]);
      f[c][1] = fma(w1, v, f[c][1]);
    });
    panel += kBlockRows, ++x, ++x4, ++x8;
  }
  unroll<columns>([&](auto c) LOWBIT_UNROLLED {
    store(acc + c * kBlockRows, f[c][0]);
    store(acc + c * kBlockRows + kTileRows, f[c][1]);
  });
}

using Tile = void (*)(const float* panel, size_t inputs, const float* x, size_t stride, float* acc);

template <size_t... i>
constexpr Tile tile_of(size_t columns, std::index_sequence<i...>) {
  constexpr Tile tiles[] = {tile<i + 1>...};
  return tiles[columns - 1];
}

// All columns in tiles of nearly equal width, so that no narrow one is left over.
void tiles(const float* panel, size_t inputs, const float* x, size_t stride, size_t count, float* acc) {
  for (size_t left = (count + kColumns - 1) / kColumns; left; --left) {
    const size_t columns = (count + left - 1) / left;
    tile_of(columns, std::make_index_sequence<kColumns>{})(panel, inputs, x, stride, acc);
    x += columns * stride, acc += columns * kBlockRows, count -= columns;
  }
}

template <typename Reader>
void product(const FloatTerm& t, size_t block, const Activations& a, size_t first, size_t count, float* acc) {
  const size_t n = a.in_features;
  const float* x = a.values + first * n;
  Reader reader(t, block, n);
  if (count == 1) return one_token(reader, x, n, acc);
  alignas(64) float panel[kPanel * kBlockRows];
  for (size_t k = 0; k < n; k += kPanel) {
    const size_t inputs = std::min(kPanel, n - k);
    for (size_t i = 0; i < inputs; i += Reader::kInputs) {
      F32 w[Reader::kInputs][2];
      reader.read(w);
      unroll<Reader::kInputs>([&](auto j) LOWBIT_UNROLLED {
        store(panel + (i + j) * kBlockRows, w[j][0]);
        store(panel + (i + j) * kBlockRows + kTileRows, w[j][1]);
      });
    }
    tiles(panel, inputs, x + k, n, count, acc);
  }
}

}  // namespace

void float_product(const FloatTerm& t, size_t block, const Activations& a, size_t first, size_t count,
                   float* acc) {
  if (!t.values) {
    const bool rare = t.entropy.offsets[2 * block + 1] != t.entropy.offsets[2 * block + 2];
    return (rare ? product<CodedReader<true>> : product<CodedReader<false>>)(t, block, a, first, count, acc);
  }
  if (t.type == Number::fp32) return product<PlainReader<Number::fp32>>(t, block, a, first, count, acc);
  if (t.type == Number::bf16) return product<PlainReader<Number::bf16>>(t, block, a, first, count, acc);
  return product<PlainReader<Number::fp16>>(t, block, a, first, count, acc);
}

}  // namespace lowbit::LOWBIT_ISA
