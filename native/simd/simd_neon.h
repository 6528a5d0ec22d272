// The operations of simd.h on AArch64: each logical vector is four q registers, `a` the lowest lanes.
// neon is the armv8-a baseline; neondot adds the dot product instructions of armv8.2-a.
#pragma once

#include <arm_neon.h>

#define LOWBIT_INLINE inline __attribute__((always_inline))
// The same operation on each of the four registers of one, two or three vectors.
#define LOWBIT_EACH1(f, x) {f(x.a), f(x.b), f(x.c), f(x.d)}
#define LOWBIT_EACH2(f, x, y) {f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)}
#define LOWBIT_EACH3(f, x, y, z) {f(x.a, y.a, z.a), f(x.b, y.b, z.b), f(x.c, y.c, z.c), f(x.d, y.d, z.d)}

namespace lowbit::LOWBIT_ISA {

// Named members, not arrays: compilers keep these in registers without first unrolling a loop.
struct F32 {
  float32x4_t a, b, c, d;
};
struct I32 {
  int32x4_t a, b, c, d;
};
struct U8 {
  uint8x16_t a, b, c, d;
};

constexpr size_t kGemmColumns = 2;  // 2 tiles x 4 registers x 2 columns: 16 of 32 registers accumulate

LOWBIT_INLINE F32 load(const float* p) {
  return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
LOWBIT_INLINE void store(float* p, F32 x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
  vst1q_f32(p + 8, x.c);
  vst1q_f32(p + 12, x.d);
}
LOWBIT_INLINE F32 load_n(const float* p, size_t n) {
  float lanes[16] = {};
  for (size_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
LOWBIT_INLINE void store_n(float* p, F32 x, size_t n) {
  float lanes[16];
  store(lanes, x);
  for (size_t i = 0; i < n; ++i) p[i] = lanes[i];
}
LOWBIT_INLINE F32 set1(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {v, v, v, v};
}
LOWBIT_INLINE F32 zero_f32() { return set1(0.0f); }
LOWBIT_INLINE F32 add(F32 x, F32 y) { return LOWBIT_EACH2(vaddq_f32, x, y); }
LOWBIT_INLINE F32 sub(F32 x, F32 y) { return LOWBIT_EACH2(vsubq_f32, x, y); }
LOWBIT_INLINE F32 mul(F32 x, F32 y) { return LOWBIT_EACH2(vmulq_f32, x, y); }
LOWBIT_INLINE F32 div(F32 x, F32 y) { return LOWBIT_EACH2(vdivq_f32, x, y); }
LOWBIT_INLINE F32 fma(F32 x, F32 y, F32 z) { return LOWBIT_EACH3(vfmaq_f32, z, x, y); }
// fmin and fmax order signed zeros and propagate NaN; the other sets keep the second operand in both cases.
LOWBIT_INLINE float32x4_t min_quarter(float32x4_t x, float32x4_t y) {
  return vbslq_f32(vcltq_f32(x, y), x, y);
}
LOWBIT_INLINE float32x4_t max_quarter(float32x4_t x, float32x4_t y) {
  return vbslq_f32(vcgtq_f32(x, y), x, y);
}
LOWBIT_INLINE F32 min(F32 x, F32 y) { return LOWBIT_EACH2(min_quarter, x, y); }
LOWBIT_INLINE F32 max(F32 x, F32 y) { return LOWBIT_EACH2(max_quarter, x, y); }
LOWBIT_INLINE F32 sqrt(F32 x) { return LOWBIT_EACH1(vsqrtq_f32, x); }
LOWBIT_INLINE F32 abs(F32 x) { return LOWBIT_EACH1(vabsq_f32, x); }
LOWBIT_INLINE F32 round_even(F32 x) { return LOWBIT_EACH1(vrndnq_f32, x); }
LOWBIT_INLINE F32 floor(F32 x) { return LOWBIT_EACH1(vrndmq_f32, x); }
LOWBIT_INLINE I32 to_i32(F32 x) { return LOWBIT_EACH1(vcvtnq_s32_f32, x); }
LOWBIT_INLINE F32 to_f32(I32 x) { return LOWBIT_EACH1(vcvtq_f32_s32, x); }
LOWBIT_INLINE I32 bits(F32 x) { return LOWBIT_EACH1(vreinterpretq_s32_f32, x); }
LOWBIT_INLINE F32 from_bits(I32 x) { return LOWBIT_EACH1(vreinterpretq_f32_s32, x); }
LOWBIT_INLINE F32 select_gt(F32 a, F32 b, F32 x, F32 y) {
  return {vbslq_f32(vcgtq_f32(a.a, b.a), x.a, y.a), vbslq_f32(vcgtq_f32(a.b, b.b), x.b, y.b),
          vbslq_f32(vcgtq_f32(a.c, b.c), x.c, y.c), vbslq_f32(vcgtq_f32(a.d, b.d), x.d, y.d)};
}
// Conversions to and from fp16 storage belong to armv8-a; only fp16 arithmetic is an extension.
LOWBIT_INLINE float32x4_t load_fp16_quarter(const uint16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
LOWBIT_INLINE F32 load_fp16(const uint16_t* p) {
  return {load_fp16_quarter(p), load_fp16_quarter(p + 4), load_fp16_quarter(p + 8),
          load_fp16_quarter(p + 12)};
}
LOWBIT_INLINE float32x4_t load_bf16_quarter(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
LOWBIT_INLINE F32 load_bf16(const uint16_t* p) {
  return {load_bf16_quarter(p), load_bf16_quarter(p + 4), load_bf16_quarter(p + 8),
          load_bf16_quarter(p + 12)};
}
LOWBIT_INLINE void store_fp16(uint16_t* p, F32 x) {
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x.a)));
  vst1_u16(p + 4, vreinterpret_u16_f16(vcvt_f16_f32(x.b)));
  vst1_u16(p + 8, vreinterpret_u16_f16(vcvt_f16_f32(x.c)));
  vst1_u16(p + 12, vreinterpret_u16_f16(vcvt_f16_f32(x.d)));
}

LOWBIT_INLINE float reduce_add(F32 v) {
  const float32x4_t x = vaddq_f32(vaddq_f32(v.a, v.c), vaddq_f32(v.b, v.d));
  const float32x2_t y = vadd_f32(vget_low_f32(x), vget_high_f32(x));
  return vget_lane_f32(y, 0) + vget_lane_f32(y, 1);
}
LOWBIT_INLINE float reduce_max(F32 v) {
  const float32x4_t x = max_quarter(max_quarter(v.a, v.c), max_quarter(v.b, v.d));
  const float32x4_t y = max_quarter(x, vextq_f32(x, x, 2));
  return vgetq_lane_f32(max_quarter(y, vextq_f32(y, y, 1)), 0);
}
LOWBIT_INLINE float reduce_min(F32 v) {
  const float32x4_t x = min_quarter(min_quarter(v.a, v.c), min_quarter(v.b, v.d));
  const float32x4_t y = min_quarter(x, vextq_f32(x, x, 2));
  return vgetq_lane_f32(min_quarter(y, vextq_f32(y, y, 1)), 0);
}

LOWBIT_INLINE I32 load_i32(const int32_t* p) {
  return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)};
}
LOWBIT_INLINE void store_i32(int32_t* p, I32 x) {
  vst1q_s32(p, x.a);
  vst1q_s32(p + 4, x.b);
  vst1q_s32(p + 8, x.c);
  vst1q_s32(p + 12, x.d);
}
LOWBIT_INLINE I32 set1_i32(int32_t x) {
  const int32x4_t v = vdupq_n_s32(x);
  return {v, v, v, v};
}
LOWBIT_INLINE I32 zero_i32() { return set1_i32(0); }
LOWBIT_INLINE I32 add(I32 x, I32 y) { return LOWBIT_EACH2(vaddq_s32, x, y); }
LOWBIT_INLINE I32 sub(I32 x, I32 y) { return LOWBIT_EACH2(vsubq_s32, x, y); }
LOWBIT_INLINE I32 mul(I32 x, I32 y) { return LOWBIT_EACH2(vmulq_s32, x, y); }
LOWBIT_INLINE I32 and_(I32 x, I32 y) { return LOWBIT_EACH2(vandq_s32, x, y); }
template <int n>
LOWBIT_INLINE I32 shift_left(I32 x) {
  return {vshlq_n_s32(x.a, n), vshlq_n_s32(x.b, n), vshlq_n_s32(x.c, n), vshlq_n_s32(x.d, n)};
}
template <int n>
LOWBIT_INLINE I32 shift_right(I32 x) {
  return {vshrq_n_s32(x.a, n), vshrq_n_s32(x.b, n), vshrq_n_s32(x.c, n), vshrq_n_s32(x.d, n)};
}
LOWBIT_INLINE I32 load_u8_i32(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_high_u8(x);
  return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_high_u16(low)),
          vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_high_u16(high))};
}
LOWBIT_INLINE void store_i8(int8_t* p, I32 x) {
  const int16x8_t low = vmovn_high_s32(vmovn_s32(x.a), x.b);
  const int16x8_t high = vmovn_high_s32(vmovn_s32(x.c), x.d);
  vst1q_s8(p, vmovn_high_s16(vmovn_s16(low), high));
}
LOWBIT_INLINE I32 scale_exponent(I32 x) { return shift_left<23>(add(x, set1_i32(127))); }

LOWBIT_INLINE U8 load_u8(const uint8_t* p) {
  return {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)};
}
LOWBIT_INLINE U8 load_once(const uint8_t* p) { return load_u8(p); }
LOWBIT_INLINE void store_u8(uint8_t* p, U8 x) {
  vst1q_u8(p, x.a);
  vst1q_u8(p + 16, x.b);
  vst1q_u8(p + 32, x.c);
  vst1q_u8(p + 48, x.d);
}
LOWBIT_INLINE U8 set1_u8(uint8_t x) {
  const uint8x16_t v = vdupq_n_u8(x);
  return {v, v, v, v};
}
LOWBIT_INLINE U8 and_(U8 x, U8 y) { return LOWBIT_EACH2(vandq_u8, x, y); }
LOWBIT_INLINE U8 or_(U8 x, U8 y) { return LOWBIT_EACH2(vorrq_u8, x, y); }
LOWBIT_INLINE U8 xor_(U8 x, U8 y) { return LOWBIT_EACH2(veorq_u8, x, y); }
template <int n>
LOWBIT_INLINE U8 shift_right(U8 x) {
  if constexpr (n == 0) {  // the instruction encodes 1..8
    return x;
  } else {
    return {vshrq_n_u8(x.a, n), vshrq_n_u8(x.b, n), vshrq_n_u8(x.c, n), vshrq_n_u8(x.d, n)};
  }
}
template <int n>
LOWBIT_INLINE U8 shift_left(U8 x) {
  return {vshlq_n_u8(x.a, n), vshlq_n_u8(x.b, n), vshlq_n_u8(x.c, n), vshlq_n_u8(x.d, n)};
}
LOWBIT_INLINE U8 spread_rows(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  const uint16x8_t low = vreinterpretq_u16_u8(vzip1q_u8(x, x)), high = vreinterpretq_u16_u8(vzip2q_u8(x, x));
  return {vreinterpretq_u8_u16(vzip1q_u16(low, low)), vreinterpretq_u8_u16(vzip2q_u16(low, low)),
          vreinterpretq_u8_u16(vzip1q_u16(high, high)), vreinterpretq_u8_u16(vzip2q_u16(high, high))};
}
LOWBIT_INLINE U8 lookup16(const uint8_t* t, U8 i) {
  const uint8x16_t table = vld1q_u8(t);
  return {vqtbl1q_u8(table, i.a), vqtbl1q_u8(table, i.b), vqtbl1q_u8(table, i.c), vqtbl1q_u8(table, i.d)};
}
LOWBIT_INLINE uint8x16x4_t load_table(const uint8_t* t) {
  return {{vld1q_u8(t), vld1q_u8(t + 16), vld1q_u8(t + 32), vld1q_u8(t + 48)}};
}
LOWBIT_INLINE U8 lookup64(const uint8_t* t, U8 i) {
  const uint8x16x4_t table = load_table(t);
  return {vqtbl4q_u8(table, i.a), vqtbl4q_u8(table, i.b), vqtbl4q_u8(table, i.c), vqtbl4q_u8(table, i.d)};
}
LOWBIT_INLINE U8 lookup256(const uint8_t* t, U8 i) {
  U8 found = lookup64(t, i);  // 0 where i >= 64; the next quarters fill in where the index is in theirs
  for (int quarter = 1; quarter < 4; ++quarter) {
    const uint8x16x4_t table = load_table(t + 64 * quarter);
    const uint8x16_t first = vdupq_n_u8(static_cast<uint8_t>(64 * quarter));
    found.a = vqtbx4q_u8(found.a, table, vsubq_u8(i.a, first));
    found.b = vqtbx4q_u8(found.b, table, vsubq_u8(i.b, first));
    found.c = vqtbx4q_u8(found.c, table, vsubq_u8(i.c, first));
    found.d = vqtbx4q_u8(found.d, table, vsubq_u8(i.d, first));
  }
  return found;
}

LOWBIT_INLINE I32 broadcast4(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return set1_i32(x);
}

LOWBIT_INLINE U8 broadcast4_u8(const uint8_t* p) {
  uint32_t x;
  __builtin_memcpy(&x, p, 4);
  const uint8x16_t v = vreinterpretq_u8_u32(vdupq_n_u32(x));
  return {v, v, v, v};
}
LOWBIT_INLINE I32 load_s8(const int8_t* p) {
  return {vreinterpretq_s32_s8(vld1q_s8(p)), vreinterpretq_s32_s8(vld1q_s8(p + 16)),
          vreinterpretq_s32_s8(vld1q_s8(p + 32)), vreinterpretq_s32_s8(vld1q_s8(p + 48))};
}

// armv8.2-a multiplies s8 by s8, so a weight goes in as w - 128 (its top bit flipped) and 128 * sum(a) is
// added. For an activation broadcast to all rows the compiler computes that sum once for all weights.
LOWBIT_INLINE int8x16_t flip_top(uint8x16_t w) { return vreinterpretq_s8_u8(veorq_u8(w, vdupq_n_u8(0x80))); }

#if defined(LOWBIT_ISA_neondot)
LOWBIT_INLINE int32x4_t dot4_small_quarter(int32x4_t acc, uint8x16_t w, int32x4_t a) {
  return vdotq_s32(acc, vreinterpretq_s8_u8(w), vreinterpretq_s8_s32(a));
}
LOWBIT_INLINE int32x4_t dot4_quarter(int32x4_t acc, uint8x16_t w, int32x4_t a) {
  const int8x16_t bytes = vreinterpretq_s8_s32(a);
  const int32x4_t sum64 = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(64), bytes);  // +128 is not an s8
  return vdotq_s32(vaddq_s32(acc, vaddq_s32(sum64, sum64)), flip_top(w), bytes);
}
#else
// Two products of a weight below 128 fit int16 together: 2 * 127 * 128 = 32512.
LOWBIT_INLINE int32x4_t dot4_small_quarter(int32x4_t acc, uint8x16_t w, int32x4_t a) {
  const int8x16_t weights = vreinterpretq_s8_u8(w), bytes = vreinterpretq_s8_s32(a);
  const int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(bytes));
  return vpadalq_s16(acc, vpaddq_s16(low, vmull_high_s8(weights, bytes)));
}
// Two products (-128) * (-128) do not, so pairs are added in int32.
LOWBIT_INLINE int32x4_t dot4_quarter(int32x4_t acc, uint8x16_t w, int32x4_t a) {
  const int8x16_t weights = flip_top(w), bytes = vreinterpretq_s8_s32(a);
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(weights), vget_low_s8(bytes)));
  const int32x4_t high = vpaddlq_s16(vmull_high_s8(weights, bytes));
  const int32x4_t sum = vpaddlq_s16(vpaddlq_s8(bytes));
  return vaddq_s32(vaddq_s32(acc, vshlq_n_s32(sum, 7)), vpaddq_s32(low, high));
}
#endif
// s8 by s8 is what the instructions multiply.
#if defined(LOWBIT_ISA_neondot)
LOWBIT_INLINE I32 dot4_signed(I32 acc, U8 w, I32 a) { return LOWBIT_EACH3(dot4_small_quarter, acc, w, a); }
using Run = I32;
constexpr size_t run_steps(int) { return 16; }
LOWBIT_INLINE Run begin_run(I32 acc) { return acc; }
LOWBIT_INLINE Run dot_run(Run run, U8 w, I32 a) { return LOWBIT_EACH3(dot4_small_quarter, run, w, a); }
LOWBIT_INLINE I32 end_run(I32, Run run) { return run; }
#else
// Two products of a weight down to -128 and an activation above -128 fit int16.
LOWBIT_INLINE I32 dot4_signed(I32 acc, U8 w, I32 a) { return LOWBIT_EACH3(dot4_small_quarter, acc, w, a); }
struct RunQuarter {
  int16x8_t low, high;  // one product a lane
};
struct Run {
  RunQuarter a, b, c, d;
};
constexpr size_t run_steps(int top) { return fitting_steps(top); }
LOWBIT_INLINE Run begin_run(I32) {
  const int16x8_t zero = vdupq_n_s16(0);
  return {{zero, zero}, {zero, zero}, {zero, zero}, {zero, zero}};
}
LOWBIT_INLINE RunQuarter dot_run_quarter(RunQuarter run, uint8x16_t w, int32x4_t a) {
  const int8x16_t weights = vreinterpretq_s8_u8(w), bytes = vreinterpretq_s8_s32(a);
  return {vmlal_s8(run.low, vget_low_s8(weights), vget_low_s8(bytes)),
          vmlal_high_s8(run.high, weights, bytes)};
}
LOWBIT_INLINE int32x4_t end_run_quarter(int32x4_t acc, RunQuarter run) {
  return vpadalq_s16(acc, vpaddq_s16(run.low, run.high));
}
LOWBIT_INLINE Run dot_run(Run run, U8 w, I32 a) { return LOWBIT_EACH3(dot_run_quarter, run, w, a); }
LOWBIT_INLINE I32 end_run(I32 acc, Run run) { return LOWBIT_EACH2(end_run_quarter, acc, run); }
#endif
constexpr bool kSignedBytes = true;
LOWBIT_INLINE I32 dot4(I32 acc, U8 w, I32 a) { return LOWBIT_EACH3(dot4_quarter, acc, w, a); }
LOWBIT_INLINE I32 dot4_small(I32 acc, U8 w, I32 a) { return LOWBIT_EACH3(dot4_small_quarter, acc, w, a); }

#undef LOWBIT_EACH1
#undef LOWBIT_EACH2
#undef LOWBIT_EACH3

}  // namespace lowbit::LOWBIT_ISA
