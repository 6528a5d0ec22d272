// Products of masked codes, where the instruction set can spread packed bytes by a mask.
#pragma once

#include "matrix.h"

namespace lowbit::LOWBIT_ISA {

#ifdef LOWBIT_ISA_avx512
constexpr bool kSparse = true;
void sparse_gemv(const SparseTerm& term, size_t block, const Activations& a, size_t token, float* acc);
void sparse_expand(const SparseTerm& term, size_t block, size_t chunks, uint8_t* codes);
#else
constexpr bool kSparse = false;
constexpr void (*sparse_gemv)(const SparseTerm&, size_t, const Activations&, size_t, float*) = nullptr;
constexpr void (*sparse_expand)(const SparseTerm&, size_t, size_t, uint8_t*) = nullptr;
#endif

}  // namespace lowbit::LOWBIT_ISA
