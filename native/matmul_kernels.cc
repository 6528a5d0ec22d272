// Dispatch of the matrix kernels over instruction sets.
#include "matmul_kernels.h"

#include "dispatch.h"

namespace lowbit {

#define LOWBIT_DECLARE(isa)            \
  namespace isa {                      \
  MatmulKernels make_matmul_kernels(); \
  }
LOWBIT_EVERY_ISA(LOWBIT_DECLARE)

static MatmulKernels make() {
#define LOWBIT_CASE(isa) \
  case Isa::isa:         \
    return isa::make_matmul_kernels();
  switch (active_isa()) {
    LOWBIT_EVERY_ISA(LOWBIT_CASE)
    default:
      return scalar::make_matmul_kernels();
  }
}

const MatmulKernels& matmul_kernels() {
  static const MatmulKernels table = make();
  return table;
}

}  // namespace lowbit
