// Crossovers between kernels and the choice that follows from them.
#include "crossover.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "bit_products.h"
#include "isa.h"
#include "matmul_kernels.h"

namespace lowbit {
namespace {

// Built in, from a Zen 5: AVX-512, and AVX2, whose sums leave the registers between chunks.
Crossovers built_in() { return active_isa() == Isa::avx512 ? Crossovers{2, 64} : Crossovers{2, 10}; }

// By measurement on a Zen 5 and, for NEON, by instructions: docs/kernels.md, "Table lookups".
constexpr unsigned kEveryTable = 0x0e0e, kOneBit = 0x0202;
unsigned built_in_tables() {
  if (active_isa() == Isa::neon) return kEveryTable;
  return active_isa() == Isa::avx512 ? 0 : kOneBit;
}

// A member makes the tables for itself, which takes as long as what they save in about four blocks.
constexpr size_t kLeastBlocks = 8;

struct Current {
  std::atomic<size_t> gemv, few;
  std::atomic<unsigned> tables;
  Current() : gemv(built_in().gemv), few(built_in().few), tables(built_in_tables()) {}
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

namespace {

enum class Forced { no, table, direct, unknown };
const std::string& override_text() {
  static const char* const value = std::getenv("LOWBIT_KERNEL");
  static const std::string text = value ? value : "";
  return text;
}
Forced forced() {
  static const Forced found = override_text().empty()       ? Forced::no
                              : override_text() == "table"  ? Forced::table
                              : override_text() == "direct" ? Forced::direct
                                                            : Forced::unknown;
  return found;
}

}  // namespace

const char* kernel_error() {
  static const std::string error =
      "LOWBIT_KERNEL=" + override_text() +
      ": must be table or direct; leave it unset to take the faster of the two, as measured";
  return forced() == Forced::unknown ? error.c_str() : nullptr;
}

bool tables_forced() { return forced() == Forced::table; }
unsigned tables() {
  if (forced() != Forced::no) return tables_forced() ? kEveryTable : 0;
  return current().tables;
}
void set_tables(unsigned widths) { current().tables = widths & kEveryTable; }

bool takes_table(const Matrix& m, const CodeTerm& t, int limbs, size_t threads) {
  const unsigned widths = limbs == 2 ? tables() >> 8 : tables();
  if (!has_table(t) || !(widths >> t.bits & 1)) return false;
  return tables_forced() || m.blocks() >= kLeastBlocks * threads;
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
  const size_t threads = team()->size();
  const bool bits = takes_bits(m, m.blocks() / threads, tokens, limbs);
  const CodeKernel kernel = code_kernel(m, tokens);
  const auto by_table = [&](const CodeTerm& t) { return takes_table(m, t, limbs, threads); };
  const bool alone = tokens == 1 && kernel == CodeKernel::gemv && !bits;
  const size_t looked_up =
      alone ? static_cast<size_t>(std::count_if(m.codes.begin(), m.codes.end(), by_table)) : 0;
  add(plain && !(looked_up && looked_up == m.codes.size()), bits ? "bits" : kernel_name(kernel));
  add(looked_up > 0, "table");
  add(m.densified > 0, "dense_mask");  // this instruction set multiplies no masks: they became dense at load
  add(!m.sparse.empty(), tokens == 1 ? "sparse" : "sparse_gemm");
  add(!m.columns.empty(), "columns");
  add(!m.low_rank.empty(), "low_rank");
  add(!m.rows.empty(), "rows");
  add(!m.entries.empty(), "entries");
  for (const GatheredTerm& t : m.gathered) add(true, kernels_of(*t.matrix, tokens, limbs) + "+gathered");
  return names;
}

}  // namespace lowbit
