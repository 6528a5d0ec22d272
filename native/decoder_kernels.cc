// Dispatch of the decoder's kernels over instruction sets.
#include "decoder_kernels.h"

#include "isa.h"

namespace lowbit {

#define LOWBIT_DECLARE(isa)                            \
  namespace isa {                                      \
  void add_elementwise_kernels(DecoderKernels& table); \
  void add_attention_kernels(DecoderKernels& table);   \
  inline DecoderKernels make_decoder_kernels() {       \
    DecoderKernels table;                              \
    add_elementwise_kernels(table);                    \
    add_attention_kernels(table);                      \
    return table;                                      \
  }                                                    \
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

static DecoderKernels make() {
  switch (active_isa()) {
#ifdef LOWBIT_HAVE_avx2
    case Isa::avx2:
      return avx2::make_decoder_kernels();
#endif
#ifdef LOWBIT_HAVE_avx512
    case Isa::avx512:
      return avx512::make_decoder_kernels();
#endif
#ifdef LOWBIT_HAVE_neon
    case Isa::neon:
      return neon::make_decoder_kernels();
    case Isa::neondot:
      return neondot::make_decoder_kernels();
#endif
    default:
      return scalar::make_decoder_kernels();
  }
}

const DecoderKernels& decoder_kernels() {
  static const DecoderKernels table = make();
  return table;
}

}  // namespace lowbit
