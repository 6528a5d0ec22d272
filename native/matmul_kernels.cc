// Dispatch of the matrix kernels over instruction sets.
#include "matmul_kernels.h"

#include "isa.h"

namespace lowbit {

#define LOWBIT_DECLARE(isa)            \
  namespace isa {                      \
  MatmulKernels make_matmul_kernels(); \
  }
LOWBIT_DECLARE(scalar)
#ifdef LOWBIT_HAVE_avx2
LOWBIT_DECLARE(avx2)
#endif
#ifdef LOWBIT_HAVE_avx512
LOWBIT_DECLARE(avx512)
#endif
#ifdef LOWBIT_HAVE_neon
LOWBIT_DECLARE(neon)
LOWBIT_DECLARE(neondot)
#endif

static MatmulKernels make() {
  switch (active_isa()) {
#ifdef LOWBIT_HAVE_avx2
    case Isa::avx2:
      return avx2::make_matmul_kernels();
#endif
#ifdef LOWBIT_HAVE_avx512
    case Isa::avx512:
      return avx512::make_matmul_kernels();
#endif
#ifdef LOWBIT_HAVE_neon
    case Isa::neon:
      return neon::make_matmul_kernels();
    case Isa::neondot:
      return neondot::make_matmul_kernels();
#endif
    default:
      return scalar::make_matmul_kernels();
  }
}

const MatmulKernels& matmul_kernels() {
  static const MatmulKernels table = make();
  return table;
}

}  // namespace lowbit
