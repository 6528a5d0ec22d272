// The vector operations in use, one set per instruction set, all on the same logical shapes:
//
//   F32  16 floats            I32  16 int32            U8  64 bytes (16 rows x 4 inputs)
//
// Every instruction set rounds alike: fma() is one rounding everywhere, reductions use one fixed tree,
// conversions round to nearest even. So a kernel written with these gives the same bits on all of them,
// and the scalar set is the definition.
//
//   F32: load(p) store(p, v) set1(x) zero_f32() add sub mul div fma(a, b, c) = a * b + c  min max  sqrt
//        reduce_add(v) reduce_max(v) reduce_min(v)   lanes i + 8, then + 4, + 2, + 1
//        load_fp16(p) load_bf16(p) store_fp16(p, v)  load_n(p, n): first n lanes, others 0; store_n(p, v, n)
//        round_even(v)  floor(v)  abs(v)  to_i32(v) (of an integral value)  to_f32(i)
//        bits(v) -> I32  from_bits(i) -> F32  select_gt(a, b, x, y) = a > b ? x : y
//        min and max give the second operand on ties and NaN
//   I32: load_i32(p) store_i32(p, v) set1_i32(x) zero_i32() add sub mul and_ shift_left<n>(v)
//        shift_right<n>(v): arithmetic
//        load_u8_i32(p): 16 bytes widened; store_i8(p, v): low bytes
//        scale_exponent(v): bits of the float 2^v, v in [-126, 127]
//   U8:  load_u8(p) load_once(p): for several uses; store_u8(p, v) set1_u8(x) and_ or_ xor_ shift_right<n>(v)
//   shift_left<n>(v): within each byte
//        spread_rows(p): byte r of 16 to bytes 4r..4r+3
//        lookup16(t, i), i < 16; lookup64(t, i), i < 64; lookup256(t, i)   t: bytes in memory
//   dot: dot4(acc, w, a)  acc[r] += sum over j of w[4r + j] * int8(a[4r + j]), exact for every u8 and s8
//        dot4_small: the same for w < 128, cheaper without VNNI
//        dot4_signed(acc, w, a): the same for w as int8 and a >= -127; the cheap one where kSignedBytes
//        broadcast4(p): four bytes to every row; broadcast4_u8(p): the same as U8
//        load_s8(p): 64 bytes as the second operand
//   Run: sums of up to run_steps(top) products of weights <= top and activations in [-127, 127]. In int16
//        where there is no byte dot product into int32, so one widening serves several of them:
//        begin_run(acc), dot_run(run, w, a), end_run(acc, run) -> acc with the run added
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit::LOWBIT_ISA {
// Steps whose sums fit int16, two products in a lane: a power of two up to 16, 1 for weights of seven bits.
constexpr size_t fitting_steps(int top) {
  size_t steps = 16;
  while (steps > 1 && steps * 2 * 127 * static_cast<size_t>(top) > 32767) steps /= 2;
  return steps;
}
}  // namespace lowbit::LOWBIT_ISA

#if defined(LOWBIT_ISA_avx512)
#include "simd_avx512.h"
#elif defined(LOWBIT_ISA_avx2) || defined(LOWBIT_ISA_avxvnni)
#include "simd_avx2.h"
#elif defined(LOWBIT_ISA_neon) || defined(LOWBIT_ISA_neondot)
#include "simd_neon.h"
#elif defined(LOWBIT_ISA_scalar)
#include "simd_scalar.h"
#else
#error "simd.h belongs in files of native/isa, which are compiled once per instruction set"
#endif
