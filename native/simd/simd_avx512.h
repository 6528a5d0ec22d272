// The operations of simd.h on AVX-512 (F, BW, DQ, VL, VNNI, VBMI, VBMI2) with GFNI.
// See simd.h for their meaning.
#pragma once

#include <immintrin.h>

#define LOWBIT_INLINE inline __attribute__((always_inline))

namespace lowbit::LOWBIT_ISA {

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
struct U8 {
  __m512i v;
};

constexpr size_t kGemmColumns = 6;  // 2 x 6 integer and 2 x 6 float accumulators fit 32 registers

LOWBIT_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
LOWBIT_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
LOWBIT_INLINE F32 load_n(const float* p, size_t n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
LOWBIT_INLINE void store_n(float* p, F32 a, size_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
LOWBIT_INLINE F32 set1(float x) { return {_mm512_set1_ps(x)}; }
LOWBIT_INLINE F32 zero_f32() { return {_mm512_setzero_ps()}; }
LOWBIT_INLINE F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
LOWBIT_INLINE F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
LOWBIT_INLINE F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
LOWBIT_INLINE F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
LOWBIT_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LOWBIT_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
LOWBIT_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
LOWBIT_INLINE F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
LOWBIT_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
LOWBIT_INLINE F32 round_even(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
LOWBIT_INLINE F32 floor(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF)}; }
LOWBIT_INLINE I32 to_i32(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
LOWBIT_INLINE F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
LOWBIT_INLINE I32 bits(F32 a) { return {_mm512_castps_si512(a.v)}; }
LOWBIT_INLINE F32 from_bits(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
LOWBIT_INLINE F32 select_gt(F32 a, F32 b, F32 x, F32 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
LOWBIT_INLINE F32 load_fp16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
LOWBIT_INLINE F32 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
LOWBIT_INLINE void store_fp16(uint16_t* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

LOWBIT_INLINE float reduce_add(F32 a) {
  const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 z = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
// Not _mm512_reduce_max_ps: its operand order is the compiler's, and decides between -0, +0 and NaN.
LOWBIT_INLINE float reduce_max(F32 a) {
  const __m256 x = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 z = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}
LOWBIT_INLINE float reduce_min(F32 a) {
  const __m256 x = _mm256_min_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 y = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 z = _mm_min_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_min_ss(z, _mm_movehdup_ps(z)));
}

LOWBIT_INLINE I32 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
LOWBIT_INLINE void store_i32(int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
LOWBIT_INLINE I32 set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
LOWBIT_INLINE I32 zero_i32() { return {_mm512_setzero_si512()}; }
LOWBIT_INLINE I32 add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
LOWBIT_INLINE I32 sub(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
LOWBIT_INLINE I32 mul(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
LOWBIT_INLINE I32 and_(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int n>
LOWBIT_INLINE I32 shift_left(I32 a) {
  return {_mm512_slli_epi32(a.v, n)};
}
template <int n>
LOWBIT_INLINE I32 shift_right(I32 a) {
  return {_mm512_srai_epi32(a.v, n)};
}
LOWBIT_INLINE I32 load_u8_i32(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
LOWBIT_INLINE void store_i8(int8_t* p, I32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
LOWBIT_INLINE I32 scale_exponent(I32 a) {
  return {_mm512_slli_epi32(_mm512_add_epi32(a.v, _mm512_set1_epi32(127)), 23)};
}

LOWBIT_INLINE U8 load_u8(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
// A load that several operations share: GCC would rather load again for each of them.
LOWBIT_INLINE U8 load_once(const uint8_t* p) {
  U8 a = load_u8(p);
  asm("" : "+v"(a.v));
  return a;
}
LOWBIT_INLINE void store_u8(uint8_t* p, U8 a) { _mm512_storeu_si512(p, a.v); }
LOWBIT_INLINE U8 set1_u8(uint8_t x) { return {_mm512_set1_epi8(static_cast<char>(x))}; }
LOWBIT_INLINE U8 and_(U8 a, U8 b) { return {_mm512_and_si512(a.v, b.v)}; }
LOWBIT_INLINE U8 or_(U8 a, U8 b) { return {_mm512_or_si512(a.v, b.v)}; }
LOWBIT_INLINE U8 xor_(U8 a, U8 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int n>
LOWBIT_INLINE U8 shift_right(U8 a) {
  // Bytes shifted within 16-bit lanes; the bits that crossed over from the neighbour are masked off.
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, n), _mm512_set1_epi8(static_cast<char>(0xff >> n)))};
}
template <int n>
LOWBIT_INLINE U8 shift_left(U8 a) {
  return {_mm512_and_si512(_mm512_slli_epi16(a.v, n), _mm512_set1_epi8(static_cast<char>(0xff << n)))};
}
// Every output bit of a byte is a sum of input bits (GFNI). LOWBIT_BIT_MATRIX says that any placement of bits
// is one operation; decode.h shifts and masks for the other sets.
#define LOWBIT_BIT_MATRIX 1
// Bits [from, from + width) of each byte to bit `to` and up, zeros elsewhere.
constexpr uint64_t bit_matrix(int from, int width, int to) {
  uint64_t rows = 0;  // output bit i is made by byte 7 - i
  for (int b = 0; b < width; ++b) rows |= (uint64_t{1} << (from + b)) << (8 * (7 - to - b));
  return rows;
}
template <uint64_t rows>
LOWBIT_INLINE U8 place(U8 a) {
  return {_mm512_gf2p8affine_epi64_epi8(a.v, _mm512_set1_epi64(static_cast<long long>(rows)), 0)};
}
// Like shift_right, but what comes in at the top of each byte is the neighbour's.
template <int n>
LOWBIT_INLINE U8 shift_right_loose(U8 a) {
  return {_mm512_srli_epi16(a.v, n)};
}
// t[low four bits of i]: no mask, since a lookup of 64 entries takes six bits and finds the table four times.
LOWBIT_INLINE U8 lookup_low4(const uint8_t* t, U8 i) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(t));
  return {_mm512_permutexvar_epi8(i.v, _mm512_broadcast_i32x4(table))};
}
// Where i >= 192: t[low six bits of i], elsewhere a.
LOWBIT_INLINE U8 lookup64_from_192(U8 a, const uint8_t* t, U8 i) {
  const __mmask64 from = _mm512_cmpge_epu8_mask(i.v, _mm512_set1_epi8(static_cast<char>(192)));
  return {_mm512_mask_permutexvar_epi8(a.v, from, i.v, _mm512_loadu_si512(t))};
}
// (a & mask) | b
LOWBIT_INLINE U8 merge(U8 a, U8 b, U8 mask) { return {_mm512_ternarylogic_epi64(a.v, b.v, mask.v, 0xEC)}; }
LOWBIT_INLINE U8 spread_rows(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_shuffle_epi8(wide, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0x00000000))};
}
LOWBIT_INLINE U8 lookup16(const uint8_t* t, U8 i) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(t));
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), i.v)};
}
LOWBIT_INLINE U8 lookup64(const uint8_t* t, U8 i) {
  return {_mm512_permutexvar_epi8(i.v, _mm512_loadu_si512(t))};
}
LOWBIT_INLINE U8 lookup256(const uint8_t* t, U8 i) {
  const __m512i lower = _mm512_permutex2var_epi8(_mm512_loadu_si512(t), i.v, _mm512_loadu_si512(t + 64));
  const __m512i upper =
      _mm512_permutex2var_epi8(_mm512_loadu_si512(t + 128), i.v, _mm512_loadu_si512(t + 192));
  return {_mm512_mask_blend_epi8(_mm512_movepi8_mask(i.v), lower, upper)};
}

LOWBIT_INLINE I32 broadcast4(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return {_mm512_set1_epi32(x)};
}
LOWBIT_INLINE U8 broadcast4_u8(const uint8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return {_mm512_set1_epi32(x)};
}
LOWBIT_INLINE I32 load_s8(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
LOWBIT_INLINE I32 dot4(I32 acc, U8 w, I32 a) { return {_mm512_dpbusd_epi32(acc.v, w.v, a.v)}; }
LOWBIT_INLINE I32 dot4_small(I32 acc, U8 w, I32 a) { return dot4(acc, w, a); }
LOWBIT_INLINE I32 dot4_signed(I32 acc, U8 w, I32 a) {  // (w + 128) * a - 128 * a
  const __m512i top = _mm512_set1_epi8(static_cast<char>(0x80));
  const __m512i sum =
      _mm512_slli_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), a.v), 7);
  return {_mm512_sub_epi32(_mm512_dpbusd_epi32(acc.v, _mm512_xor_si512(w.v, top), a.v), sum)};
}
// A dot product adds to int32 at no cost, so a run is the sum itself.
constexpr bool kSignedBytes = false;
using Run = I32;
constexpr size_t run_steps(int) { return 16; }
LOWBIT_INLINE Run begin_run(I32 acc) { return acc; }
LOWBIT_INLINE Run dot_run(Run run, U8 w, I32 a) { return dot4(run, w, a); }
LOWBIT_INLINE I32 end_run(I32, Run run) { return run; }

}  // namespace lowbit::LOWBIT_ISA
