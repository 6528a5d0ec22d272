// The kernels that depend on a term's stored form.
#pragma once

#include "isa/decode.h"

namespace lowbit::LOWBIT_ISA {

struct CodeKernels {
  void (*gemv)(const CodeTerm& term, size_t block, const Activations& a, size_t token, float* acc);
  void (*unpack)(const CodeTerm& term, size_t block, size_t chunks, uint8_t* panel);
};
CodeKernels code_kernels(const CodeTerm& term, int limbs);

// Weight bytes below 128 (linear codes of up to 7 bits) have a cheaper product on some machines.
template <int bits, Map map>
LOWBIT_INLINE I32 dot_bytes(I32 acc, U8 w, I32 x) {
  if constexpr (map == Map::linear && bits < 8) return dot4_small(acc, w, x);
  return dot4(acc, w, x);
}

// The sum over a segment of level * activation as a float. dot[weight limb][activation limb]; the integer
// parts stay within int32: 255 * 16256 * 64 < 2^29.
template <Map map, int limbs>
LOWBIT_INLINE F32 total(const CodeTerm& t, const I32 (&dot)[2][2], const SegmentScale& s) {
  I32 part = dot[0][0];
  if constexpr (limbs == 2) part = add(shift_left<7>(part), dot[0][1]);
  F32 sum = to_f32(correct(t, part, s));
  if constexpr (map == Map::table2) {
    I32 lower = dot[1][0];
    if constexpr (limbs == 2) lower = add(shift_left<7>(lower), dot[1][1]);
    sum = fma(sum, set1(static_cast<float>(kLimbBase)), to_f32(correct(t, lower, s)));
  }
  return sum;
}

}  // namespace lowbit::LOWBIT_ISA
