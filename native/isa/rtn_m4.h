// m4 scales: the scale of a super-group and the multipliers of its groups, a row in each lane.
// quantize/multipliers.py says what is computed and why, and gives the same bits.
#pragma once

#include "isa/rtn_search.h"

namespace lowbit::LOWBIT_ISA::rtn {

constexpr int kScaleCandidates = 16;  // scales of a super-group
constexpr float kLowest = 0.8f / 15;  // of the largest scale of a group
constexpr float kRatio = 1.038f;      // between candidates
constexpr float kTopMultiplier = 15.0f;
constexpr int kOffered = 3;     // multipliers tried at a time, for independent sums
constexpr int kEvery = 15 / 3;  // rounds of kOffered through all of 1 .. 15

// The groups of one super-group, whose first column is `first`, in scratch memory.
struct SuperGroup {
  size_t count;       // groups
  float* w;           // [count][n][16]
  float* importance;  // [count][n][16]
  float* best;        // [count][16] multipliers of the best choice yet
  float* chosen;      // [count][16] multipliers of the last choice
  float* alone;       // [count][16] magnitude of the scale that a group would take alone
  float* high;        // [count][16] and so on: the members of Group
  float* low;
  float* rms;
  float* mean;
  size_t n;  // inputs of a group

  SuperGroup(const RtnJob& job, size_t first, float* weights, float* errors_count, float* vectors)
      : count(job.together), w(weights), importance(errors_count), n(job.group_size) {
    const size_t size = kTileRows * count;
    float** const members[kGroupVectors] = {&best, &chosen, &alone, &high, &low, &rms, &mean};
    for (size_t i = 0; i < kGroupVectors; ++i) *members[i] = vectors + i * size;
    for (size_t j = 0; j < count; ++j) {
      const Group g = describe(w + kTileRows * n * j, importance + kTileRows * n * j, n, job.weigh,
                               job.counts ? job.counts + first + n * j : nullptr);
      store(high + 16 * j, g.high);
      store(low + 16 * j, g.low);
      store(rms + 16 * j, g.rms);
      store(mean + 16 * j, g.mean);
    }
  }
  Group group(size_t j) const {
    return {w + kTileRows * n * j,
            importance + kTileRows * n * j,
            n,
            load(high + 16 * j),
            load(low + 16 * j),
            load(rms + 16 * j),
            load(mean + 16 * j)};
  }
};

// Squared error of unit * q less that of zero.
LOWBIT_INLINE F32 relative_error(F32 unit, const Sums& s) {
  return mul(unit, sub(mul(unit, s.qq), mul(set1(2.0f), s.wq)));
}

// The best multiplier of one group yet.
struct Choice {
  F32 error, multiplier, wq, qq;
};

// Tries kOffered multipliers under `scale`. The sums of the choice are those of multiplier times level.
template <typename Levels>
LOWBIT_INLINE void try_multipliers(const Group& g, F32 scale, F32 step, const F32* offered,
                                   const Levels& levels, Choice* choice) {
  F32 unit[kOffered], inv[kOffered];
  Sums s[kOffered];
  for (int k = 0; k < kOffered; ++k) {
    unit[k] = mul(mul(scale, offered[k]), step);
    inv[k] = inverse(unit[k]);
    s[k] = {zero_f32(), zero_f32(), zero_f32()};
  }
  for (size_t i = 0; i < g.n; ++i) {
    const F32 v = load(g.w + 16 * i), count = load(g.importance + 16 * i), weighted = mul(count, v);
    for (int k = 0; k < kOffered; ++k) {
      const F32 q = levels.value(mul(v, inv[k]));
      s[k].wq = add(s[k].wq, mul(weighted, q));
      s[k].qq = add(s[k].qq, mul(mul(count, q), q));
    }
  }
  for (int k = 0; k < kOffered; ++k) {
    const F32 m = offered[k], e = relative_error(unit[k], s[k]), least = choice->error;
    choice->error = select_gt(least, e, e, least);
    choice->multiplier = select_gt(least, e, m, choice->multiplier);
    choice->wq = select_gt(least, e, mul(m, s[k].wq), choice->wq);
    choice->qq = select_gt(least, e, mul(mul(m, m), s[k].qq), choice->qq);
  }
}

// The scale that fits each group alone, and its largest over the groups.
template <typename Levels>
F32 fit_alone(const LevelTable& t, const SuperGroup& s, bool negative, const Levels& levels) {
  const F32 minus = set1(-1.0f);
  F32 largest = zero_f32();
  for (size_t j = 0; j < s.count; ++j) {
    const Group g = s.group(j);
    const F32 cover = negative ? covering_scale(mul(g.low, minus), mul(g.high, minus), t)
                               : covering_scale(g.high, g.low, t);
    F32 scale, ratio, most = zero_f32(), alone = zero_f32();
    candidate_bounds(cover, g.rms, t, &scale, &ratio);
    for (int k = 0; k <= 1 << t.roots; ++k) {
      const F32 signed_scale = negative ? mul(scale, minus) : scale;
      F32 fitted;
      const F32 gain =
          gain_of(correlate(g, inverse(mul(signed_scale, set1(t.step))), levels), false, &fitted);
      alone = select_gt(gain, most, mul(abs(fitted), set1(1.0f / t.step)), alone);
      most = select_gt(gain, most, gain, most);
      scale = mul(scale, ratio);
    }
    store(s.alone + 16 * j, alone);
    largest = max(largest, alone);
  }
  return largest;
}

// The smallest scale with which every group is covered; sets s.best and returns the scale and its error.
template <typename Levels>
F32 cover_m4(const RtnJob& job, const LevelTable& t, const SuperGroup& s, const Levels& levels, F32* error) {
  F32 largest = zero_f32();
  for (size_t j = 0; j < s.count; ++j) {
    const Group g = s.group(j);
    const F32 wanted = job.mean_start ? mul(g.mean, set1(t.top_inverse)) : covering_scale(g.high, g.low, t);
    store(s.alone + 16 * j, wanted);
    largest = max(largest, wanted);
  }
  const F32 scale = round_scale(mul(largest, set1(1.0f / kTopMultiplier)), job.scale_type);
  *error = zero_f32();
  for (size_t j = 0; j < s.count; ++j) {
    const F32 ratio = mul(load(s.alone + 16 * j), inverse(scale)), near = round_even(ratio);
    const F32 up = select_gt(ratio, near, add(near, set1(1.0f)), near);
    const F32 m = clamp(up, zero_f32(), set1(kTopMultiplier)), unit = mul(mul(scale, m), set1(t.step));
    store(s.best + 16 * j, m);
    *error = add(*error, relative_error(unit, correlate(s.group(j), inverse(unit), levels)));
  }
  return scale;
}

// Sets s.best and returns the scale.
template <typename Levels>
F32 search_m4(const RtnJob& job, const LevelTable& t, const SuperGroup& s, const Levels& levels) {
  const F32 zero = zero_f32(), step = set1(t.step), inverse_step = set1(1.0f / t.step);
  const Choice none = {zero, zero, zero, zero};
  F32 error;
  F32 best = cover_m4(job, t, s, levels, &error);
  if (!job.mse) return best;
  F32 most = zero, refit = best;
  for (int sign = 0; sign < (t.both_signs ? 2 : 1); ++sign) {
    F32 scale = mul(fit_alone(t, s, sign, levels), set1(kLowest));
    for (int k = 0; k < kScaleCandidates; ++k) {
      const F32 signed_scale = sign ? mul(scale, set1(-1.0f)) : scale;
      F32 wq = zero, qq = zero, fitted;
      for (size_t j = 0; j < s.count; ++j) {
        const F32 near = round_even(mul(load(s.alone + 16 * j), inverse(scale)));
        F32 offered[kOffered];
        for (int i = 0; i < kOffered; ++i)
          offered[i] = clamp(add(near, set1(static_cast<float>(i - 1))), zero, set1(kTopMultiplier));
        Choice choice = none;
        try_multipliers(s.group(j), signed_scale, step, offered, levels, &choice);
        wq = add(wq, choice.wq);
        qq = add(qq, choice.qq);
      }
      const F32 gain = gain_of({zero, wq, qq}, false, &fitted);
      refit = select_gt(gain, most, mul(fitted, inverse_step), refit);
      most = select_gt(gain, most, gain, most);
      scale = mul(scale, set1(kRatio));
    }
  }
  for (int round = 0; round < kRefinements; ++round) {
    const F32 stored = round_scale(refit, job.scale_type);
    F32 wq = zero, qq = zero, found = zero;
    for (size_t j = 0; j < s.count; ++j) {
      Choice choice = none;
      for (int k = 0; k < kEvery; ++k) {
        F32 offered[kOffered];
        for (int i = 0; i < kOffered; ++i) offered[i] = set1(static_cast<float>(kOffered * k + i + 1));
        try_multipliers(s.group(j), stored, step, offered, levels, &choice);
      }
      store(s.chosen + 16 * j, choice.multiplier);
      found = add(found, choice.error);
      wq = add(wq, choice.wq);
      qq = add(qq, choice.qq);
    }
    for (size_t j = 0; j < s.count; ++j)
      store(s.best + 16 * j, select_gt(error, found, load(s.chosen + 16 * j), load(s.best + 16 * j)));
    best = select_gt(error, found, stored, best);
    error = select_gt(error, found, found, error);
    refit = mul(zero_unless_positive(qq, div(wq, qq)), inverse_step);
  }
  return best;
}

}  // namespace lowbit::LOWBIT_ISA::rtn
