// Dispatch of the decoder's kernels over instruction sets.
#include "decoder_kernels.h"

#include "dispatch.h"

namespace lowbit {

#define LOWBIT_DECLARE(isa)                                  \
  namespace isa {                                            \
  void add_elementwise_kernels(DecoderKernels& table);       \
  void add_attention_kernels(DecoderKernels& table);         \
  void add_integer_attention_kernels(DecoderKernels& table); \
  void add_kv_kernels(DecoderKernels& table);                \
  void add_page_kernels(DecoderKernels& table);              \
  void add_expert_kernels(DecoderKernels& table);            \
  }
LOWBIT_EVERY_ISA(LOWBIT_DECLARE)

static DecoderKernels make() {
  DecoderKernels table;
#define LOWBIT_CASE(isa)                       \
  case Isa::isa:                               \
    isa::add_elementwise_kernels(table);       \
    isa::add_attention_kernels(table);         \
    isa::add_integer_attention_kernels(table); \
    isa::add_kv_kernels(table);                \
    isa::add_page_kernels(table);              \
    isa::add_expert_kernels(table);            \
    break;
  switch (active_isa()) {
    LOWBIT_EVERY_ISA(LOWBIT_CASE)
    default:
      break;
  }
  return table;
}

const DecoderKernels& decoder_kernels() {
  static const DecoderKernels table = make();
  return table;
}

}  // namespace lowbit
