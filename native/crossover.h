// Which kernel multiplies a matrix with how many tokens. The choice never changes a result, only its time.
#pragma once

#include <cstddef>

#include <string>

#include "matrix.h"

namespace lowbit {

enum class CodeKernel {
  gemv,   // decoded in registers or, for one token, looked up in tables; once per token
  few,    // decoded in registers, once for up to eight tokens
  gemm,   // unpacked to a panel, for any number of tokens
  floats  // no codes
};

// The largest batches that gemv and few are taken for. Measured once per machine (kernels/tuning.py).
struct Crossovers {
  size_t gemv, few;
};
constexpr size_t kMostFew = 64;  // neither may be larger

Crossovers crossovers();
void set_crossovers(const Crossovers& c);

// Widths of codes that one token meets by table lookup where the term allows it (has_table): bit `bits`, or
// bit 8 + bits with 16-bit activations. Measured like the crossovers; LOWBIT_KERNEL=table or direct decides
// alone.
unsigned tables();
void set_tables(unsigned widths);
bool tables_forced();  // LOWBIT_KERNEL=table
// What is wrong with LOWBIT_KERNEL, or null.
const char* kernel_error();
// Whether a term of such a matrix takes its table.
bool takes_table(const Matrix& m, const CodeTerm& t, int limbs, size_t threads);

CodeKernel code_kernel(const Matrix& m, size_t tokens);
const char* kernel_name(CodeKernel kernel);
// The same for all terms of a matrix: "gemv+columns", "sparse+low_rank".
std::string kernels_of(const Matrix& m, size_t tokens, int limbs);

}  // namespace lowbit
