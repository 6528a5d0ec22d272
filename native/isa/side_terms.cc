// Terms that multiply float activations beside the codes: outlier columns and entries, low rank. Every sum
// has one order, whatever the number of tokens.
#include "decode.h"
#include "side_kernels.h"
#include "sparse.h"

namespace lowbit::LOWBIT_ISA {
namespace {

template <size_t tokens>
void columns_tile(const uint16_t* values, const uint32_t* columns, size_t count, const float* x,
                  size_t stride, float* acc) {
  F32 f[tokens][2];
  unroll<tokens>([&](auto t) LOWBIT_UNROLLED {
    f[t][0] = load(acc + t * kBlockRows);
    f[t][1] = load(acc + t * kBlockRows + kTileRows);
  });
  for (size_t j = 0; j < count; ++j) {
    const F32 w0 = load_fp16(values + j * kBlockRows), w1 = load_fp16(values + j * kBlockRows + kTileRows);
    const float* at = x + (columns ? columns[j] : j);
    unroll<tokens>([&](auto t) LOWBIT_UNROLLED {
      const F32 v = set1(at[t * stride]);
      f[t][0] = fma(w0, v, f[t][0]);
      f[t][1] = fma(w1, v, f[t][1]);
    });
  }
  unroll<tokens>([&](auto t) LOWBIT_UNROLLED {
    store(acc + t * kBlockRows, f[t][0]);
    store(acc + t * kBlockRows + kTileRows, f[t][1]);
  });
}

void add_columns(const uint16_t* values, const uint32_t* columns, size_t count, const float* x, size_t stride,
                 size_t tokens, float* acc) {
  constexpr size_t wide = kGemmColumns;
  size_t t = 0;
  for (; t + wide <= tokens; t += wide)
    columns_tile<wide>(values, columns, count, x + t * stride, stride, acc + t * kBlockRows);
  for (; t < tokens; ++t)
    columns_tile<1>(values, columns, count, x + t * stride, stride, acc + t * kBlockRows);
}

// The next up to 16 entries with their weights widened.
struct Entries {
  uint32_t columns[16];
  float values[16];
};

LOWBIT_INLINE void load_entries(const EntriesTerm& term, size_t begin, size_t count, Entries& e) {
  uint16_t halves[16] = {};
  __builtin_memcpy(halves, term.values + 2 * begin, 2 * count);
  __builtin_memcpy(e.columns, term.columns + 4 * begin, 4 * count);
  store(e.values, load_fp16(halves));
}

void add_entries(const EntriesTerm& term, size_t begin, size_t end, const float* x, float* acc) {
  Entries e;
  for (size_t i = begin; i < end; i += 16) {
    const size_t count = end - i < 16 ? end - i : 16;
    load_entries(term, i, count, e);
    for (size_t j = 0; j < count; ++j) {
      float& sum = acc[term.rows[i + j]];
      sum = __builtin_fmaf(e.values[j], x[e.columns[j]], sum);
    }
  }
}

void add_entries_wide(const EntriesTerm& term, size_t begin, size_t end, const float* x, size_t width,
                      float* acc) {
  Entries e;
  for (size_t i = begin; i < end; i += 16) {
    const size_t count = end - i < 16 ? end - i : 16;
    load_entries(term, i, count, e);
    for (size_t j = 0; j < count; ++j) {
      const F32 value = set1(e.values[j]);
      float* const sum = acc + term.rows[i + j] * width;
      const float* const at = x + e.columns[j] * width;
      for (size_t t = 0; t < width; t += 16) store(sum + t, fma(value, load(at + t), load(sum + t)));
    }
  }
}

LOWBIT_INLINE F32 load_halves(const uint16_t* p, size_t n) {
  uint16_t halves[16] = {};
  __builtin_memcpy(halves, p, 2 * n);
  return load_fp16(halves);
}

// Sixteen running sums per product, over inputs i, i + 16, .., added at the end in the order of reduce_add.
template <size_t rows, size_t tokens>
LOWBIT_INLINE void project_tile(const uint16_t* v, size_t n, const float* x, size_t rank, float* out) {
  F32 sum[rows][tokens];
  unroll<rows * tokens>([&](auto i) LOWBIT_UNROLLED { sum[i / tokens][i % tokens] = zero_f32(); });
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    F32 w[rows];
    unroll<rows>([&](auto r) LOWBIT_UNROLLED { w[r] = load_fp16(v + r * n + i); });
    unroll<tokens>([&](auto t) LOWBIT_UNROLLED {
      const F32 value = load(x + t * n + i);
      unroll<rows>([&](auto r) LOWBIT_UNROLLED { sum[r][t] = fma(w[r], value, sum[r][t]); });
    });
  }
  unroll<rows * tokens>([&](auto j) LOWBIT_UNROLLED {
    F32& s = sum[j / tokens][j % tokens];
    const size_t r = j / tokens, t = j % tokens;
    if (i < n) s = fma(load_halves(v + r * n + i, n - i), load_n(x + t * n + i, n - i), s);
    out[t * rank + r] = reduce_add(s);
  });
}

template <size_t rows, size_t tokens>
size_t project_tiles(const LowRankTerm& term, size_t n, const float* x, size_t first, size_t last,
                     float* out) {
  for (; first + rows <= last; first += rows)
    project_tile<rows, tokens>(term.v + first * n, n, x, term.rank, out + first);
  return first;
}

void project(const LowRankTerm& term, size_t n, const float* x, size_t tokens, size_t first, size_t last,
             float* out) {
  constexpr size_t side =
      kGemmColumns > 4 ? 4 : 2;  // side * side sums and 2 * side operands fit the registers
  size_t t = 0;
  for (; t + side <= tokens; t += side) {
    const size_t r = project_tiles<side, side>(term, n, x + t * n, first, last, out + t * term.rank);
    project_tiles<1, side>(term, n, x + t * n, r, last, out + t * term.rank);
  }
  for (; t < tokens; ++t) {
    const size_t r = project_tiles<2 * side, 1>(term, n, x + t * n, first, last, out + t * term.rank);
    project_tiles<1, 1>(term, n, x + t * n, r, last, out + t * term.rank);
  }
}

}  // namespace

SideKernels make_side_kernels();
SideKernels make_side_kernels() {
  return {kSparse, sparse_gemv, sparse_expand, add_columns, add_entries, add_entries_wide, project};
}

}  // namespace lowbit::LOWBIT_ISA
