// The kernels that depend on a term's stored form.
#pragma once

#include "isa/decode.h"

namespace lowbit::LOWBIT_ISA {

struct CodeKernels {
  void (*gemv)(const CodeTerm& term, size_t block, const Activations& a, size_t token, float* acc);
  void (*unpack)(const CodeTerm& term, size_t block, size_t chunks, uint8_t* panel);
};
CodeKernels code_kernels(const CodeTerm& term, int limbs);

// A panel of codes or table entries (level + 128) becomes one of level * multiplier + 128.
void multiply_panel(const CodeTerm& term, size_t block, size_t chunks, uint8_t* panel);

// Weight bytes below 128 (linear codes of up to 7 bits) have a cheaper product on some machines.
template <int bits, Map map>
LOWBIT_INLINE I32 dot_bytes(I32 acc, U8 w, I32 x) {
  if constexpr (map == Map::linear && bits < 8) return dot4_small(acc, w, x);
  return dot4(acc, w, x);
}

}  // namespace lowbit::LOWBIT_ISA
