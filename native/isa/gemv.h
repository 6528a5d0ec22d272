// The kernels that depend on a term's stored form.
#pragma once

#include "isa/decode.h"

namespace lowbit::LOWBIT_ISA {

struct CodeKernels {
  void (*gemv)(const CodeTerm& term, size_t block, const Activations& a, size_t token, float* acc);
};
CodeKernels code_kernels(const CodeTerm& term, int limbs);

// acc += the 8 steps of a tile's bytes times 32 activations. Bytes of tables and of 8-bit codes take the
// whole range of a byte: where kSignedBytes, they stand for byte - 128 (see start() in decode.h).
template <int bits, Map map>
LOWBIT_INLINE I32 dot_chunk(I32 acc, const U8 (&w)[kSteps], const int8_t* x) {
  if constexpr (is_wide<bits, map> && kSignedBytes) {
    const U8 top = set1_u8(0x80);
    unroll<kSteps>([&](auto s)
                       LOWBIT_UNROLLED { acc = dot4_signed(acc, xor_(w[s], top), broadcast4(x + 4 * s)); });
  } else {
    constexpr size_t limit = run_steps(is_wide<bits, map> ? 255 : (1 << bits) - 1);
    constexpr size_t steps = limit < kSteps ? limit : kSteps;
    unroll<kSteps / steps>([&](auto r) LOWBIT_UNROLLED {
      Run run = begin_run(acc);
      unroll<steps>([&](auto s) LOWBIT_UNROLLED {
        run = dot_run(run, w[r * steps + s], broadcast4(x + 4 * (r * steps + s)));
      });
      acc = end_run(acc, run);
    });
  }
  return acc;
}

}  // namespace lowbit::LOWBIT_ISA
