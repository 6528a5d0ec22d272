// Which kernel multiplies a matrix with how many tokens. The choice never changes a result, only its time.
#pragma once

#include <cstddef>

#include <string>

#include "matrix.h"

namespace lowbit {

enum class CodeKernel {
  gemv,   // decoded in registers, once per token
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

CodeKernel code_kernel(const Matrix& m, size_t tokens);
const char* kernel_name(CodeKernel kernel);
// The same for all terms of a matrix: "gemv+columns", "sparse+low_rank".
std::string kernels_of(const Matrix& m, size_t tokens, int limbs);

}  // namespace lowbit
