// Dot products of signed weights, for the product of many tokens. To simd.h's operations these are added:
//
//   activations4<depth>(p)     four activations for every row, in the form that dot_signed wants
//   dot_signed<depth>(acc, w, x)   acc[r] += sum over j of int8(w[4r + j]) * x[4r + j], exact for weights of
//                              -128 .. 127 (see kDepths) and activations of -127 .. 127
//   kDepths                    how far sums fit 16 bits where there is no dot product into 32: depth 8, 4 and
//   1
//                              for |w| <= 8, 16, 64; depth 0 for all others. Elsewhere there is depth 1 only
//   kBiased<depth>             whether x is activation + 128, so that a sum has to start from -128 * sum(w)
//   sum_signed(acc, w)         acc[r] += sum over j of int8(w[4r + j])
//   add_bytes sub_bytes mul_bytes    modulo 256
//
// vpdpbusd wants unsigned times signed. Making the *activations* unsigned costs nothing, since the broadcast
// is an exclusive or with a memory operand, and what it adds to a sum is the same for every token.
#pragma once

#include "simd/simd.h"

namespace lowbit::LOWBIT_ISA {

#if defined(LOWBIT_ISA_avx2)
constexpr bool kDepths = true;
#else
constexpr bool kDepths = false;
#endif
constexpr int largest_weight(int depth) { return depth ? 64 / depth : 128; }

#if defined(LOWBIT_ISA_avx512)

template <int depth>
constexpr bool kBiased = true;

template <int depth>
LOWBIT_INLINE I32 activations4(const int8_t* p) {
  return {_mm512_xor_si512(broadcast4(p).v, _mm512_set1_epi8(static_cast<char>(0x80)))};
}
// As assembly: GCC 12 copies accumulators around where the intrinsic's result is not its first operand.
template <int depth>
LOWBIT_INLINE I32 dot_signed(I32 acc, U8 w, I32 x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(x.v), "v"(w.v));
  return acc;
}
LOWBIT_INLINE I32 sum_signed(I32 acc, U8 w) { return {_mm512_dpbusd_epi32(acc.v, _mm512_set1_epi8(1), w.v)}; }
LOWBIT_INLINE U8 add_bytes(U8 a, U8 b) { return {_mm512_add_epi8(a.v, b.v)}; }
LOWBIT_INLINE U8 sub_bytes(U8 a, U8 b) { return {_mm512_sub_epi8(a.v, b.v)}; }
LOWBIT_INLINE U8 mul_bytes(U8 a, U8 b) {
  const __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(a.v, 8), _mm512_srli_epi16(b.v, 8));
  const __m512i even = _mm512_mullo_epi16(a.v, b.v);
  return {_mm512_mask_blend_epi8(0x5555555555555555u, _mm512_slli_epi16(odd, 8), even)};
}

#elif defined(LOWBIT_ISA_avx2) || defined(LOWBIT_ISA_avxvnni)

#if defined(LOWBIT_ISA_avxvnni)
template <int depth>
constexpr bool kBiased = true;
template <int depth>
LOWBIT_INLINE __m256i dot_signed_half(__m256i acc, __m256i w, __m256i x) {
  return _mm256_dpbusd_avx_epi32(acc, x, w);
}
#else
// 255 * 64 * 2 = 32640 fits int16. Larger weights take |w| and the activation with the sign of w: 128 * 127
// * 2.
template <int depth>
constexpr bool kBiased = depth > 0;
template <int depth>
LOWBIT_INLINE __m256i dot_signed_half(__m256i acc, __m256i w, __m256i x) {
  const __m256i pairs =
      depth ? _mm256_maddubs_epi16(x, w) : _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

template <int depth>
LOWBIT_INLINE I32 activations4(const int8_t* p) {
  const I32 x = broadcast4(p);
  if constexpr (!kBiased<depth>) return x;
  const __m256i top = _mm256_set1_epi8(static_cast<char>(0x80));
  return {_mm256_xor_si256(x.a, top), _mm256_xor_si256(x.b, top)};
}
template <int depth>
LOWBIT_INLINE I32 dot_signed(I32 acc, U8 w, I32 x) {
  return {dot_signed_half<depth>(acc.a, w.a, x.a), dot_signed_half<depth>(acc.b, w.b, x.b)};
}
LOWBIT_INLINE I32 sum_signed(I32 acc, U8 w) {
  const __m256i one = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(one, w.a), ones)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(one, w.b), ones))};
}
LOWBIT_INLINE U8 add_bytes(U8 x, U8 y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
LOWBIT_INLINE U8 sub_bytes(U8 x, U8 y) { return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)}; }
LOWBIT_INLINE __m256i mul_bytes_half(__m256i x, __m256i y) {
  const __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(x, 8), _mm256_srli_epi16(y, 8));
  const __m256i low = _mm256_set1_epi16(0x00ff);
  return _mm256_or_si256(_mm256_slli_epi16(odd, 8), _mm256_and_si256(_mm256_mullo_epi16(x, y), low));
}
LOWBIT_INLINE U8 mul_bytes(U8 x, U8 y) { return {mul_bytes_half(x.a, y.a), mul_bytes_half(x.b, y.b)}; }

#elif defined(LOWBIT_ISA_neon) || defined(LOWBIT_ISA_neondot)

template <int depth>
constexpr bool kBiased = false;

template <int depth>
LOWBIT_INLINE I32 activations4(const int8_t* p) {
  return broadcast4(p);
}
LOWBIT_INLINE int32x4_t dot_signed_quarter(int32x4_t acc, uint8x16_t weights, int32x4_t activations) {
  const int8x16_t w = vreinterpretq_s8_u8(weights), x = vreinterpretq_s8_s32(activations);
#if defined(LOWBIT_ISA_neondot)
  return vdotq_s32(acc, w, x);
#else  // two products fit int16: 2 * 128 * 127 = 32512
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
  return vpadalq_s16(acc, vpaddq_s16(low, vmull_high_s8(w, x)));
#endif
}
LOWBIT_INLINE int32x4_t sum_signed_quarter(int32x4_t acc, uint8x16_t w) {
  return vaddq_s32(acc, vpaddlq_s16(vpaddlq_s8(vreinterpretq_s8_u8(w))));
}
template <int depth>
LOWBIT_INLINE I32 dot_signed(I32 acc, U8 w, I32 x) {
  return {dot_signed_quarter(acc.a, w.a, x.a), dot_signed_quarter(acc.b, w.b, x.b),
          dot_signed_quarter(acc.c, w.c, x.c), dot_signed_quarter(acc.d, w.d, x.d)};
}
LOWBIT_INLINE I32 sum_signed(I32 acc, U8 w) {
  return {sum_signed_quarter(acc.a, w.a), sum_signed_quarter(acc.b, w.b), sum_signed_quarter(acc.c, w.c),
          sum_signed_quarter(acc.d, w.d)};
}
LOWBIT_INLINE U8 add_bytes(U8 x, U8 y) {
  return {vaddq_u8(x.a, y.a), vaddq_u8(x.b, y.b), vaddq_u8(x.c, y.c), vaddq_u8(x.d, y.d)};
}
LOWBIT_INLINE U8 sub_bytes(U8 x, U8 y) {
  return {vsubq_u8(x.a, y.a), vsubq_u8(x.b, y.b), vsubq_u8(x.c, y.c), vsubq_u8(x.d, y.d)};
}
LOWBIT_INLINE U8 mul_bytes(U8 x, U8 y) {
  return {vmulq_u8(x.a, y.a), vmulq_u8(x.b, y.b), vmulq_u8(x.c, y.c), vmulq_u8(x.d, y.d)};
}

#else

template <int depth>
constexpr bool kBiased = false;

template <int depth>
inline I32 activations4(const int8_t* p) {
  return broadcast4(p);
}
template <int depth>
inline I32 dot_signed(I32 acc, U8 w, I32 x) {
  int8_t signed_bytes[64];
  std::memcpy(signed_bytes, x.v, 64);
  for (int r = 0; r < 16; ++r)
    for (int j = 0; j < 4; ++j) acc.v[r] += static_cast<int8_t>(w.v[4 * r + j]) * signed_bytes[4 * r + j];
  return acc;
}
inline I32 sum_signed(I32 acc, U8 w) {
  for (int i = 0; i < 64; ++i) acc.v[i / 4] += static_cast<int8_t>(w.v[i]);
  return acc;
}
inline U8 add_bytes(U8 a, U8 b) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] + b.v[i]);
  return a;
}
inline U8 sub_bytes(U8 a, U8 b) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] - b.v[i]);
  return a;
}
inline U8 mul_bytes(U8 a, U8 b) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] * b.v[i]);
  return a;
}

#endif

}  // namespace lowbit::LOWBIT_ISA
