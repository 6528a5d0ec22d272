// The operations of simd.h in plain C++: the definition that the other sets are held against.
#pragma once

#include <cmath>
#include <cstring>

#define LOWBIT_INLINE inline

namespace lowbit::LOWBIT_ISA {

struct F32 {
  float v[16];
};
struct I32 {
  int32_t v[16];
};
struct U8 {
  uint8_t v[64];
};

constexpr size_t kGemmColumns = 2;

#define LOWBIT_MAP(type, n, expression)                  \
  do {                                                   \
    type out;                                            \
    for (int i = 0; i < n; ++i) out.v[i] = (expression); \
    return out;                                          \
  } while (0)

inline F32 load(const float* p) { LOWBIT_MAP(F32, 16, p[i]); }
inline void store(float* p, F32 a) { std::memcpy(p, a.v, sizeof a.v); }
inline F32 load_n(const float* p, size_t n) { LOWBIT_MAP(F32, 16, static_cast<size_t>(i) < n ? p[i] : 0.0f); }
inline void store_n(float* p, F32 a, size_t n) { std::memcpy(p, a.v, n * sizeof(float)); }
inline F32 set1(float x) { LOWBIT_MAP(F32, 16, x); }
inline F32 zero_f32() { return set1(0.0f); }
inline F32 add(F32 a, F32 b) { LOWBIT_MAP(F32, 16, a.v[i] + b.v[i]); }
inline F32 sub(F32 a, F32 b) { LOWBIT_MAP(F32, 16, a.v[i] - b.v[i]); }
inline F32 mul(F32 a, F32 b) { LOWBIT_MAP(F32, 16, a.v[i] * b.v[i]); }
inline F32 div(F32 a, F32 b) { LOWBIT_MAP(F32, 16, a.v[i] / b.v[i]); }
inline F32 fma(F32 a, F32 b, F32 c) { LOWBIT_MAP(F32, 16, std::fma(a.v[i], b.v[i], c.v[i])); }
inline F32 min(F32 a, F32 b) { LOWBIT_MAP(F32, 16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F32 max(F32 a, F32 b) { LOWBIT_MAP(F32, 16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F32 sqrt(F32 a) { LOWBIT_MAP(F32, 16, std::sqrt(a.v[i])); }
inline F32 abs(F32 a) { LOWBIT_MAP(F32, 16, std::fabs(a.v[i])); }
inline F32 round_even(F32 a) { LOWBIT_MAP(F32, 16, std::nearbyint(a.v[i])); }
inline F32 floor(F32 a) { LOWBIT_MAP(F32, 16, std::floor(a.v[i])); }
inline I32 to_i32(F32 a) { LOWBIT_MAP(I32, 16, static_cast<int32_t>(a.v[i])); }
inline F32 to_f32(I32 a) { LOWBIT_MAP(F32, 16, static_cast<float>(a.v[i])); }
inline I32 bits(F32 a) {
  I32 out;
  std::memcpy(out.v, a.v, sizeof out.v);
  return out;
}
inline F32 from_bits(I32 a) {
  F32 out;
  std::memcpy(out.v, a.v, sizeof out.v);
  return out;
}
inline F32 select_gt(F32 a, F32 b, F32 x, F32 y) { LOWBIT_MAP(F32, 16, a.v[i] > b.v[i] ? x.v[i] : y.v[i]); }

inline float fp16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24 is exact
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  uint32_t x = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  if (exponent == 31 && mantissa) x |= 0x00400000u;  // NaN keeps its payload and becomes quiet
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline uint16_t float_to_fp16(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((x >> 16) & 0x8000);
  x &= 0x7fffffff;
  if (x > 0x7f800000) return sign | 0x7e00 | ((x >> 13) & 0x1ff);  // NaN: quiet, top of its payload
  if (x >= 0x477ff000) return sign | 0x7c00;                       // rounds to infinity
  if (x < 0x38800000) {                                            // subnormal: multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &x, 4);
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  }
  x += 0xfff + ((x >> 13) & 1);  // nearest even on the 13 dropped bits
  return sign | static_cast<uint16_t>((x - 0x38000000) >> 13);
}
inline F32 load_fp16(const uint16_t* p) { LOWBIT_MAP(F32, 16, fp16_to_float(p[i])); }
inline void store_fp16(uint16_t* p, F32 a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_fp16(a.v[i]);
}
inline F32 load_bf16(const uint16_t* p) {
  I32 wide;
  for (int i = 0; i < 16; ++i) wide.v[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
  return from_bits(wide);
}

template <typename Combine>
inline float reduce(F32 a, Combine combine) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = combine(a.v[i], a.v[i + half]);
  return a.v[0];
}
inline float reduce_add(F32 a) {
  return reduce(a, [](float x, float y) { return x + y; });
}
inline float reduce_max(F32 a) {
  return reduce(a, [](float x, float y) { return x > y ? x : y; });
}
inline float reduce_min(F32 a) {
  return reduce(a, [](float x, float y) { return x < y ? x : y; });
}

inline I32 load_i32(const int32_t* p) { LOWBIT_MAP(I32, 16, p[i]); }
inline void store_i32(int32_t* p, I32 a) { std::memcpy(p, a.v, sizeof a.v); }
inline I32 set1_i32(int32_t x) { LOWBIT_MAP(I32, 16, x); }
inline I32 zero_i32() { return set1_i32(0); }
// Two's complement wrap-around, as the vector instructions have it.
inline int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }
inline I32 add(I32 a, I32 b) {
  LOWBIT_MAP(I32, 16, wrap(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])));
}
inline I32 sub(I32 a, I32 b) {
  LOWBIT_MAP(I32, 16, wrap(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i])));
}
inline I32 mul(I32 a, I32 b) {
  LOWBIT_MAP(I32, 16, wrap(static_cast<uint32_t>(a.v[i]) * static_cast<uint32_t>(b.v[i])));
}
inline I32 and_(I32 a, I32 b) { LOWBIT_MAP(I32, 16, a.v[i] & b.v[i]); }
template <int n>
inline I32 shift_left(I32 a) {
  LOWBIT_MAP(I32, 16, wrap(static_cast<uint32_t>(a.v[i]) << n));
}
template <int n>
inline I32 shift_right(I32 a) {
  LOWBIT_MAP(I32, 16, a.v[i] >> n);
}
inline I32 load_u8_i32(const uint8_t* p) { LOWBIT_MAP(I32, 16, p[i]); }
inline void store_i8(int8_t* p, I32 a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
inline I32 scale_exponent(I32 a) { return shift_left<23>(add(a, set1_i32(127))); }

inline U8 load_u8(const uint8_t* p) {
  U8 out;
  std::memcpy(out.v, p, 64);
  return out;
}
inline U8 load_once(const uint8_t* p) { return load_u8(p); }
inline void store_u8(uint8_t* p, U8 a) { std::memcpy(p, a.v, 64); }
inline U8 set1_u8(uint8_t x) { LOWBIT_MAP(U8, 64, x); }
inline U8 and_(U8 a, U8 b) { LOWBIT_MAP(U8, 64, a.v[i] & b.v[i]); }
inline U8 or_(U8 a, U8 b) { LOWBIT_MAP(U8, 64, a.v[i] | b.v[i]); }
inline U8 xor_(U8 a, U8 b) { LOWBIT_MAP(U8, 64, static_cast<uint8_t>(a.v[i] ^ b.v[i])); }
template <int n>
inline U8 shift_right(U8 a) {
  LOWBIT_MAP(U8, 64, static_cast<uint8_t>(a.v[i] >> n));
}
template <int n>
inline U8 shift_left(U8 a) {
  LOWBIT_MAP(U8, 64, static_cast<uint8_t>(a.v[i] << n));
}
inline U8 spread_rows(const uint8_t* p) { LOWBIT_MAP(U8, 64, p[i / 4]); }
inline U8 lookup16(const uint8_t* t, U8 a) { LOWBIT_MAP(U8, 64, t[a.v[i]]); }
inline U8 lookup64(const uint8_t* t, U8 a) { LOWBIT_MAP(U8, 64, t[a.v[i]]); }
inline U8 lookup256(const uint8_t* t, U8 a) { LOWBIT_MAP(U8, 64, t[a.v[i]]); }

inline I32 broadcast4(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return set1_i32(x);
}
inline U8 broadcast4_u8(const uint8_t* p) { LOWBIT_MAP(U8, 64, p[i % 4]); }
inline I32 load_s8(const int8_t* p) {
  I32 out;
  std::memcpy(out.v, p, 64);
  return out;
}
inline I32 dot4(I32 acc, U8 w, I32 a) {
  int8_t signed_bytes[64];
  std::memcpy(signed_bytes, a.v, 64);
  for (int r = 0; r < 16; ++r)
    for (int j = 0; j < 4; ++j) acc.v[r] += w.v[4 * r + j] * signed_bytes[4 * r + j];
  return acc;
}
inline I32 dot4_small(I32 acc, U8 w, I32 a) { return dot4(acc, w, a); }
inline I32 dot4_signed(I32 acc, U8 w, I32 a) {
  int8_t weights[64], signed_bytes[64];
  std::memcpy(weights, w.v, 64);
  std::memcpy(signed_bytes, a.v, 64);
  for (int k = 0; k < 64; ++k) acc.v[k / 4] += weights[k] * signed_bytes[k];
  return acc;
}
constexpr bool kSignedBytes = false;
using Run = I32;
constexpr size_t run_steps(int) { return 16; }
inline Run begin_run(I32 acc) { return acc; }
inline Run dot_run(Run run, U8 w, I32 a) { return dot4(run, w, a); }
inline I32 end_run(I32, Run run) { return run; }

#undef LOWBIT_MAP

}  // namespace lowbit::LOWBIT_ISA
