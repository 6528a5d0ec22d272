// Crossovers between kernels and the choice that follows from them.
#include "crossover.h"

#include <algorithm>
#include <atomic>

#include "bit_products.h"
#include "isa.h"
#include "matmul_kernels.h"

namespace lowbit {
namespace {

// Built in, from a Zen 5: AVX-512, and AVX2, whose sums leave the registers between chunks.
Crossovers built_in() { return active_isa() == Isa::avx512 ? Crossovers{2, 64} : Crossovers{2, 10}; }

struct Current {
  std::atomic<size_t> gemv, few;
  Current() : gemv(built_in().gemv), few(built_in().few) {}
};

Current& current() {
  static Current c;
  return c;
}

}  // namespace

Crossovers crossovers() { return {current().gemv, current().few}; }

void set_crossovers(const Crossovers& c) {
  current().gemv = std::clamp<size_t>(c.gemv, 1, kMostFew);
  current().few = std::clamp<size_t>(c.few, 1, kMostFew);
}

CodeKernel code_kernel(const Matrix& m, size_t tokens) {
  const auto every = [&](bool (*has)(const CodeTerm&)) {
    return std::all_of(m.codes.begin(), m.codes.end(), has);
  };
  if (m.codes.empty()) return CodeKernel::floats;
  const Crossovers c = crossovers();
  if (tokens == 1 && every(has_gemv)) return CodeKernel::gemv;
  if (tokens > 1 && tokens <= c.few && every(has_few)) return CodeKernel::few;
  if (tokens <= c.gemv && every(has_gemv)) return CodeKernel::gemv;
  return CodeKernel::gemm;
}

const char* kernel_name(CodeKernel kernel) {
  switch (kernel) {
    case CodeKernel::gemv:
      return "gemv";
    case CodeKernel::few:
      return "few";
    case CodeKernel::gemm:
      return "gemm";
    default:
      return "float";
  }
}

std::string kernels_of(const Matrix& m, size_t tokens, int limbs) {
  std::string names;
  const auto add = [&](bool present, const std::string& name) {
    if (present) names += (names.empty() ? "" : "+") + name;
  };
  const bool plain = !m.codes.empty() || !m.floats.empty();
  const bool bits = takes_bits(m, m.blocks() / team()->size(), tokens, limbs);
  add(plain, bits ? "bits" : kernel_name(code_kernel(m, tokens)));
  add(m.densified > 0, "dense_mask");  // this instruction set multiplies no masks: they became dense at load
  add(!m.sparse.empty(), tokens == 1 ? "sparse" : "sparse_gemm");
  add(!m.columns.empty(), "columns");
  add(!m.low_rank.empty(), "low_rank");
  add(!m.rows.empty(), "rows");
  add(!m.entries.empty(), "entries");
  return names;
}

}  // namespace lowbit
