// How numbers become levels, and scales what their storage type holds: the parts of rtn.cc below the search.
#pragma once

#include <cmath>
#include <cstring>

#include "rtn.h"
#include "simd/simd.h"

namespace lowbit::LOWBIT_ISA::rtn {

constexpr float kTiny = 0x1p-100f;      // smaller fp32 scales count as 0
constexpr float kSmallest = 0x1p-120f;  // the reciprocal of a smaller number counts as 0

LOWBIT_INLINE F32 zero_unless_positive(F32 test, F32 v) { return select_gt(test, zero_f32(), v, zero_f32()); }
LOWBIT_INLINE F32 inverse(F32 s) {
  return select_gt(abs(s), set1(kSmallest), div(set1(1.0f), s), zero_f32());
}
LOWBIT_INLINE F32 clamp(F32 v, F32 low, F32 high) { return min(max(v, low), high); }

// How a number in units of the scale becomes a level: value(x), in units of the step, and its code.
struct Linear {
  F32 first, top;
  explicit Linear(const LevelTable& t) : first(set1(t.first)), top(set1(static_cast<float>(t.count - 1))) {}
  LOWBIT_INLINE F32 code(F32 x) const { return clamp(round_even(sub(x, first)), zero_f32(), top); }
  LOWBIT_INLINE F32 value(F32 x) const { return add(code(x), first); }
};

// Few levels: step up the table as long as the boundary lies below.
struct Chain {
  const LevelTable& t;
  explicit Chain(const LevelTable& table) : t(table) {}
  LOWBIT_INLINE F32 code(F32 x) const {
    F32 v = set1(static_cast<float>(t.codes[0]));
    for (size_t i = 1; i < t.count; ++i)
      v = select_gt(x, set1(t.boundaries[i - 1]), set1(static_cast<float>(t.codes[i])), v);
    return v;
  }
  LOWBIT_INLINE F32 value(F32 x) const {
    F32 v = set1(t.levels[0]);
    for (size_t i = 1; i < t.count; ++i) v = select_gt(x, set1(t.boundaries[i - 1]), set1(t.levels[i]), v);
    return v;
  }
};

// Many levels: start where the bucket of the number begins, lane by lane.
struct Lookup {
  const LevelTable& t;
  explicit Lookup(const LevelTable& table) : t(table) {}
  LOWBIT_INLINE size_t index(float x) const {
    uint32_t pattern;
    std::memcpy(&pattern, &x, 4);
    size_t i = t.lookup[pattern >> kLookupShift];
    while (i + 1 < t.count && t.boundaries[i] < x) ++i;
    return i;
  }
  template <typename Get>
  LOWBIT_INLINE F32 map(F32 x, Get get) const {
    float lanes[16];
    store(lanes, x);
    for (float& lane : lanes) lane = get(index(lane));
    return load(lanes);
  }
  LOWBIT_INLINE F32 code(F32 x) const {
    return map(x, [this](size_t i) { return static_cast<float>(t.codes[i]); });
  }
  LOWBIT_INLINE F32 value(F32 x) const {
    return map(x, [this](size_t i) { return t.levels[i]; });
  }
};

// Asymmetric integers: the value is code - zero_point.
struct Affine {
  F32 zero, top;
  LOWBIT_INLINE F32 code(F32 x) const { return clamp(add(round_even(x), zero), zero_f32(), top); }
  LOWBIT_INLINE F32 value(F32 x) const { return sub(code(x), zero); }
};

inline uint8_t to_e8m0(float s) {
  uint32_t x;
  std::memcpy(&x, &s, 4);
  uint32_t code = x >> 23;
  const uint32_t mantissa = x & 0x7fffff;
  if (mantissa > 0x400000 || (mantissa == 0x400000 && (code & 1))) ++code;
  return static_cast<uint8_t>(code < 254 ? code : 254);
}
inline float from_e8m0(uint8_t code) { return std::ldexp(1.0f, code - 127); }

// e4m3fn: quanta of 2^-9 below 2^-6, then 8 numbers per power of two, up to 448.
inline uint8_t to_e4m3(float s) {
  const float magnitude = std::fabs(s) < 448.0f ? std::fabs(s) : 448.0f;
  const uint8_t sign = std::signbit(s) ? 128 : 0;
  if (magnitude == 0.0f) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);
  const int lowest = exponent - 1 > -6 ? exponent - 1 : -6;  // power of the leading bit
  int mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - lowest)));
  // A mantissa of 16 carries into the exponent field by itself; below 8 it is subnormal.
  return static_cast<uint8_t>(sign | (((lowest + 6) << 3) + mantissa));
}
inline float from_e4m3(uint8_t code) {
  const int field = (code >> 3) & 15, mantissa = code & 7;
  const float magnitude = field ? std::ldexp(8.0f + mantissa, field - 10) : std::ldexp(1.0f * mantissa, -9);
  return code & 128 ? -magnitude : magnitude;
}

// A scale as its storage type holds it; quantize/scale.py:round_scale.
inline F32 round_scale(F32 s, Number type) {
  if (type == Number::fp32) return select_gt(set1(kTiny), abs(s), zero_f32(), s);
  if (type == Number::fp16) {
    uint16_t half[16];
    store_fp16(half, clamp(s, set1(-65504.0f), set1(65504.0f)));
    return load_fp16(half);
  }
  float lanes[16];
  store(lanes, s);
  for (float& x : lanes) {
    if (type == Number::e8m0) {
      x = std::fabs(x) > kTiny ? std::fabs(x) : kTiny;
      x = from_e8m0(to_e8m0(x < 0x1p127f ? x : 0x1p127f));
    } else {
      x = from_e4m3(to_e4m3(x));
    }
  }
  return load(lanes);
}

}  // namespace lowbit::LOWBIT_ISA::rtn
