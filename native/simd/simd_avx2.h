// The operations of simd.h on AVX2 with FMA and F16C: each logical vector is two registers.
// avxvnni adds the dot product of AVX-VNNI (vpdpbusd on ymm).
#pragma once

#include <immintrin.h>

#define LOWBIT_INLINE inline __attribute__((always_inline))

namespace lowbit::LOWBIT_ISA {

struct F32 {
  __m256 a, b;
};
struct I32 {
  __m256i a, b;
};
struct U8 {
  __m256i a, b;
};

constexpr size_t kGemmColumns = 2;  // 2 tiles x 2 registers x 2 columns: 8 of 16 registers accumulate

// A sum that the compiler must form now. GCC turns a chain of additions into a tree and keeps every summand
// alive until the end: sixteen registers do not hold them, and most are stored and loaded again.
LOWBIT_INLINE __m256i in_order(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

LOWBIT_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LOWBIT_INLINE void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
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
LOWBIT_INLINE F32 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LOWBIT_INLINE F32 zero_f32() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
LOWBIT_INLINE F32 add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
LOWBIT_INLINE F32 sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
LOWBIT_INLINE F32 mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
LOWBIT_INLINE F32 div(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
LOWBIT_INLINE F32 fma(F32 x, F32 y, F32 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
LOWBIT_INLINE F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
LOWBIT_INLINE F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
LOWBIT_INLINE F32 sqrt(F32 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
LOWBIT_INLINE F32 abs(F32 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
LOWBIT_INLINE F32 round_even(F32 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
LOWBIT_INLINE F32 floor(F32 x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
LOWBIT_INLINE I32 to_i32(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
LOWBIT_INLINE F32 to_f32(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
LOWBIT_INLINE I32 bits(F32 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
LOWBIT_INLINE F32 from_bits(I32 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
LOWBIT_INLINE F32 select_gt(F32 a, F32 b, F32 x, F32 y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ))};
}
LOWBIT_INLINE F32 load_fp16(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
LOWBIT_INLINE F32 load_bf16(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  const __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128(q));
  const __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}
LOWBIT_INLINE void store_fp16(uint16_t* p, F32 x) {
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

LOWBIT_INLINE float reduce_add(F32 v) {
  const __m256 x = _mm256_add_ps(v.a, v.b);
  const __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 z = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
LOWBIT_INLINE float reduce_max(F32 v) {
  const __m256 x = _mm256_max_ps(v.a, v.b);
  const __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 z = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}
LOWBIT_INLINE float reduce_min(F32 v) {
  const __m256 x = _mm256_min_ps(v.a, v.b);
  const __m128 y = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 z = _mm_min_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_min_ss(z, _mm_movehdup_ps(z)));
}

LOWBIT_INLINE I32 load_i32(const int32_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
LOWBIT_INLINE void store_i32(int32_t* p, I32 x) {
  __m256i* q = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.a);
  _mm256_storeu_si256(q + 1, x.b);
}
LOWBIT_INLINE I32 set1_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
LOWBIT_INLINE I32 zero_i32() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
LOWBIT_INLINE I32 add(I32 x, I32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
LOWBIT_INLINE I32 sub(I32 x, I32 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
LOWBIT_INLINE I32 mul(I32 x, I32 y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
LOWBIT_INLINE I32 and_(I32 x, I32 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int n>
LOWBIT_INLINE I32 shift_left(I32 x) {
  return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)};
}
template <int n>
LOWBIT_INLINE I32 shift_right(I32 x) {
  return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)};
}
LOWBIT_INLINE I32 load_u8_i32(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
LOWBIT_INLINE void store_i8(int8_t* p, I32 x) {
  int32_t lanes[16];
  store_i32(lanes, x);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}
LOWBIT_INLINE I32 scale_exponent(I32 x) { return shift_left<23>(add(x, set1_i32(127))); }

LOWBIT_INLINE U8 load_u8(const uint8_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
// A load that several operations share: GCC would rather load again for each of them.
LOWBIT_INLINE U8 load_once(const uint8_t* p) {
  const U8 x = load_u8(p);
  return {in_order(x.a), in_order(x.b)};
}
LOWBIT_INLINE void store_u8(uint8_t* p, U8 x) {
  __m256i* q = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.a);
  _mm256_storeu_si256(q + 1, x.b);
}
LOWBIT_INLINE U8 set1_u8(uint8_t x) {
  const __m256i v = _mm256_set1_epi8(static_cast<char>(x));
  return {v, v};
}
LOWBIT_INLINE U8 and_(U8 x, U8 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
LOWBIT_INLINE U8 or_(U8 x, U8 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
LOWBIT_INLINE U8 xor_(U8 x, U8 y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int n>
LOWBIT_INLINE U8 shift_right(U8 x) {
  const U8 shifted = {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)};
  return and_(shifted, set1_u8(static_cast<uint8_t>(0xff >> n)));
}
template <int n>
LOWBIT_INLINE U8 shift_left(U8 x) {
  const U8 shifted = {_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)};
  return and_(shifted, set1_u8(static_cast<uint8_t>(0xff << n)));
}
LOWBIT_INLINE U8 spread_rows(const uint8_t* p) {
  const __m256i pick = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5,
                                        5, 6, 6, 6, 6, 7, 7, 7, 7);
  const __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_shuffle_epi8(x, pick), _mm256_shuffle_epi8(x, _mm256_add_epi8(pick, _mm256_set1_epi8(8)))};
}
LOWBIT_INLINE U8 lookup16(const uint8_t* t, U8 i) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(t)));
  return {_mm256_shuffle_epi8(table, i.a), _mm256_shuffle_epi8(table, i.b)};
}
LOWBIT_INLINE U8 lookup256(const uint8_t* t, U8 i) {  // no byte shuffle of this width: one load a byte
  uint8_t lanes[64];
  store_u8(lanes, i);
  for (int k = 0; k < 64; ++k) lanes[k] = t[lanes[k]];
  return load_u8(lanes);
}
LOWBIT_INLINE U8 lookup64(const uint8_t* t, U8 i) {
  const U8 low = and_(i, set1_u8(0x0f));
  const U8 quarter = shift_right<4>(i);
  U8 result = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int q = 0; q < 4; ++q) {
    const U8 found = lookup16(t + 16 * q, low);
    const __m256i want = _mm256_set1_epi8(static_cast<char>(q));
    result.a = _mm256_or_si256(result.a, _mm256_and_si256(found.a, _mm256_cmpeq_epi8(quarter.a, want)));
    result.b = _mm256_or_si256(result.b, _mm256_and_si256(found.b, _mm256_cmpeq_epi8(quarter.b, want)));
  }
  return result;
}

LOWBIT_INLINE I32 broadcast4(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return set1_i32(x);
}
LOWBIT_INLINE U8 broadcast4_u8(const uint8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
LOWBIT_INLINE I32 load_s8(const int8_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
#if defined(LOWBIT_ISA_avxvnni)
LOWBIT_INLINE I32 dot4(I32 acc, U8 w, I32 a) {
  return {_mm256_dpbusd_avx_epi32(acc.a, w.a, a.a), _mm256_dpbusd_avx_epi32(acc.b, w.b, a.b)};
}
LOWBIT_INLINE I32 dot4_small(I32 acc, U8 w, I32 a) { return dot4(acc, w, a); }
LOWBIT_INLINE I32 dot4_signed(I32 acc, U8 w, I32 a) {  // (w + 128) * a - 128 * a
  const __m256i top = _mm256_set1_epi8(static_cast<char>(0x80));
  const U8 raised = {_mm256_xor_si256(w.a, top), _mm256_xor_si256(w.b, top)};
  return sub(dot4(acc, raised, a), shift_left<7>(dot4(zero_i32(), set1_u8(1), a)));
}
// A dot product adds to int32 at no cost, so a run is the sum itself.
constexpr bool kSignedBytes = false;
using Run = I32;
constexpr size_t run_steps(int) { return 16; }
LOWBIT_INLINE Run begin_run(I32 acc) { return acc; }
LOWBIT_INLINE Run dot_run(Run run, U8 w, I32 a) { return dot4(run, w, a); }
LOWBIT_INLINE I32 end_run(I32, Run run) { return run; }
#else
// maddubs adds two products in int16. 127 * -128 * 2 and 128 * -128 * 2 = -32768 fit, 255 * 127 * 2 does
// not, so the top bit of the weight goes through its own product: exact for every u8 and s8.
LOWBIT_INLINE __m256i dot4_half(__m256i acc, __m256i w, __m256i a) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i top = _mm256_set1_epi8(static_cast<char>(0x80));
  const __m256i lower = _mm256_maddubs_epi16(_mm256_andnot_si256(top, w), a);
  const __m256i upper = _mm256_maddubs_epi16(_mm256_and_si256(top, w), a);
  return _mm256_add_epi32(acc,
                          _mm256_add_epi32(_mm256_madd_epi16(lower, ones), _mm256_madd_epi16(upper, ones)));
}
LOWBIT_INLINE I32 dot4(I32 acc, U8 w, I32 a) {
  return {dot4_half(acc.a, w.a, a.a), dot4_half(acc.b, w.b, a.b)};
}
// The same for weights below 128, half the work.
LOWBIT_INLINE __m256i dot4_small_half(__m256i acc, __m256i w, __m256i a) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
}
LOWBIT_INLINE I32 dot4_small(I32 acc, U8 w, I32 a) {
  return {dot4_small_half(acc.a, w.a, a.a), dot4_small_half(acc.b, w.b, a.b)};
}
// Magnitude of the weight times the activation with the weight's sign: 2 * 128 * 127 fits int16.
LOWBIT_INLINE __m256i dot4_signed_half(__m256i acc, __m256i w, __m256i a) {
  return dot4_small_half(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
}
LOWBIT_INLINE I32 dot4_signed(I32 acc, U8 w, I32 a) {
  return {dot4_signed_half(acc.a, w.a, a.a), dot4_signed_half(acc.b, w.b, a.b)};
}
constexpr bool kSignedBytes = true;
struct Run {
  __m256i a, b;  // 16 int16: two products each
};
constexpr size_t run_steps(int top) { return fitting_steps(top); }
LOWBIT_INLINE Run begin_run(I32) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
LOWBIT_INLINE Run dot_run(Run run, U8 w, I32 a) {
  return {in_order(_mm256_add_epi16(run.a, _mm256_maddubs_epi16(w.a, a.a))),
          in_order(_mm256_add_epi16(run.b, _mm256_maddubs_epi16(w.b, a.b)))};
}
LOWBIT_INLINE I32 end_run(I32 acc, Run run) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(run.a, ones)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(run.b, ones))};
}
#endif

}  // namespace lowbit::LOWBIT_ISA
