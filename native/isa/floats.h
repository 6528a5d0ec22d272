// Products with float weights; see MatmulKernels::float_product.
#pragma once

#include "decode.h"

namespace lowbit::LOWBIT_ISA {

void float_product(const FloatTerm& t, size_t block, const Activations& a, size_t first, size_t count,
                   float* acc);

}  // namespace lowbit::LOWBIT_ISA
