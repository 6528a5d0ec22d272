// Products with float weights; see MatmulKernels::float_product.
#pragma once

#include "decode.h"

namespace lowbit::LOWBIT_ISA {

// Blocks that one token wants at once: one running sum per row leaves the multipliers waiting for each other.
constexpr size_t kFloatBlocks = 4;

void float_product(const FloatTerm& t, size_t block, size_t blocks, const Activations& a, size_t first,
                   size_t count, float* acc);

}  // namespace lowbit::LOWBIT_ISA
