// What every search for scales shares: the groups of one tile, a row in each lane, and the sums over them.
// quantize/search.py says what is computed and why.
#pragma once

#include <cmath>

#include "isa/rtn_levels.h"

namespace lowbit::LOWBIT_ISA::rtn {

constexpr int kRefinements = 3;
constexpr float kFlat = 0.75f;  // share of an error that counts alike for all weights
constexpr float kUpper = 1.25f;

struct Sums {
  F32 error, wq, qq;
};

struct Group {
  const float* w;           // [n][16]
  const float* importance;  // [n][16], how much the error of a weight counts
  size_t n;
  F32 high, low, rms, mean;  // largest and smallest (or 0), root mean square, mean magnitude
};

// Sums over a group; inv = 1 / (scale * step), q the nearest levels in units of the step, each product
// times the importance g: <gw, q> and <gq, q>.
template <typename Levels>
LOWBIT_INLINE Sums correlate(const Group& group, F32 inv, const Levels& levels) {
  Sums s = {zero_f32(), zero_f32(), zero_f32()};
  for (size_t i = 0; i < group.n; ++i) {
    const F32 v = load(group.w + 16 * i), g = load(group.importance + 16 * i);
    const F32 q = levels.value(mul(v, inv));
    s.wq = add(s.wq, mul(mul(g, v), q));
    s.qq = add(s.qq, mul(mul(g, q), q));
  }
  return s;
}

// The same at unit = scale * step, with the error.
template <typename Levels>
LOWBIT_INLINE Sums evaluate(const Group& group, F32 unit, const Levels& levels) {
  Sums s = {zero_f32(), zero_f32(), zero_f32()};
  const F32 inv = inverse(unit);
  for (size_t i = 0; i < group.n; ++i) {
    const F32 v = load(group.w + 16 * i), g = load(group.importance + 16 * i);
    const F32 q = levels.value(mul(v, inv)), rest = sub(v, mul(unit, q));
    s.error = add(s.error, mul(g, mul(rest, rest)));
    s.wq = add(s.wq, mul(mul(g, v), q));
    s.qq = add(s.qq, mul(mul(g, q), q));
  }
  return s;
}

struct Best {
  F32 scale, zero, error;
};

// Fills importance[n][16]. counts: [n], times which the errors of all rows count, or null.
inline Group describe(const float* w, float* importance, size_t n, bool weigh, const float* counts) {
  Group g = {w, importance, n, zero_f32(), zero_f32(), zero_f32(), zero_f32()};
  F32 squares = zero_f32(), magnitudes = zero_f32();
  for (size_t i = 0; i < n; ++i) {
    const F32 v = load(w + 16 * i);
    g.high = max(g.high, v);
    g.low = min(g.low, v);
    squares = add(squares, mul(v, v));
    magnitudes = add(magnitudes, abs(v));
  }
  const F32 share = set1(static_cast<float>(1.0 / static_cast<double>(n)));
  const F32 mean_square = mul(squares, share);
  g.rms = sqrt(mean_square);
  g.mean = mul(magnitudes, share);
  const F32 part = mul(inverse(mean_square), set1(1.0f - kFlat));
  for (size_t i = 0; i < n; ++i) {
    const F32 v = load(w + 16 * i);
    const F32 own = weigh ? add(mul(mul(v, v), part), set1(kFlat)) : set1(1.0f);
    store(importance + 16 * i, counts ? mul(own, set1(counts[i])) : own);
  }
  return g;
}

inline F32 covering_scale(F32 high, F32 low, const LevelTable& t) {
  return max(mul(high, set1(t.top_inverse)), mul(low, set1(t.bottom_inverse)));
}

inline F32 starting_scale(const RtnJob& job, const LevelTable& t, const Group& g) {
  if (job.mean_start) return round_scale(mul(g.mean, set1(t.top_inverse)), job.scale_type);
  if (job.scale_type != Number::e8m0) return round_scale(covering_scale(g.high, g.low, t), job.scale_type);
  float lanes[16];
  store(lanes, max(g.high, sub(zero_f32(), g.low)));
  for (float& x : lanes) {
    int exponent;
    std::frexp(x, &exponent);
    exponent -= t.top_exponent;
    x = std::ldexp(1.0f, exponent > -126 ? exponent : -126);
  }
  return round_scale(load(lanes), job.scale_type);
}

// Lowest candidate and the ratio between neighbours, up to kUpper times the covering scale.
inline void candidate_bounds(F32 cover, F32 rms, const LevelTable& t, F32* lower, F32* ratio) {
  const F32 upper = mul(cover, set1(kUpper));
  *lower = min(max(mul(rms, set1(t.lower_normal)), mul(cover, set1(t.lower_cover))), mul(upper, set1(0.8f)));
  *ratio = zero_unless_positive(*lower, div(upper, *lower));
  for (int i = 0; i < t.roots; ++i) *ratio = sqrt(*ratio);
}

inline bool is_fine(Number type) { return type == Number::fp16 || type == Number::fp32; }

// Tries a candidate rounded to its type; returns the candidate refitted.
template <typename Levels>
F32 keep_better(const RtnJob& job, const Group& g, const Levels& levels, float step, F32 candidate, F32 zero,
                Best* best) {
  const F32 stored = round_scale(candidate, job.scale_type);
  const Sums s = evaluate(g, mul(stored, set1(step)), levels);
  best->scale = select_gt(best->error, s.error, stored, best->scale);
  best->zero = select_gt(best->error, s.error, zero, best->zero);
  best->error = select_gt(best->error, s.error, s.error, best->error);
  return mul(zero_unless_positive(s.qq, div(s.wq, s.qq)), set1(1.0f / step));
}

// Keeps the refitted scale if its gain is the largest yet.
LOWBIT_INLINE F32 gain_of(const Sums& s, bool positive_only, F32* fitted) {
  *fitted = zero_unless_positive(s.qq, div(s.wq, s.qq));
  const F32 gain = mul(*fitted, s.wq);
  return positive_only ? zero_unless_positive(*fitted, gain) : gain;
}

}  // namespace lowbit::LOWBIT_ISA::rtn
