// Sums of scaled planes of two or three levels, fitted by turns, a row in each lane. quantize/stacked.py,
// binary_coded.py and trit_planes.py say what is computed and why, and give the same bits.
#pragma once

#include <limits>

#include "isa/rtn_write.h"

namespace lowbit::LOWBIT_ISA::rtn {

constexpr float kRidge = 1e-4f;
constexpr int kBinaryRounds = 6, kTernaryRounds = 10;
constexpr float kThreshold = 0.7f;  // of the mean magnitude, above which the greedy fit has a level

// The planes of one group. The codes of a weight are the digits of a number in base 4, plane 0 lowest.
struct Planes {
  size_t count;
  bool ternary;
  Number scale_type;
  float* sums;  // [combinations][16] scratch

  size_t levels() const { return ternary ? 3 : 2; }
  // The value of a digit: -1, 0, 1 or -1, 1.
  LOWBIT_INLINE F32 value(F32 digit) const {
    return ternary ? sub(digit, set1(1.0f)) : sub(add(digit, digit), set1(1.0f));
  }
};

// Removes the lowest digit of codes and returns it.
LOWBIT_INLINE F32 next_digit(F32* codes) {
  const F32 rest = floor(mul(*codes, set1(0.25f))), digit = sub(*codes, mul(rest, set1(4.0f)));
  *codes = rest;
  return digit;
}

// codes[n][16]: the combination of levels whose scaled sum is nearest to each weight; returns the error.
inline F32 assign(const Planes& planes, const Group& g, const F32* scales, float* codes) {
  size_t combinations = 1;
  for (size_t p = 0; p < planes.count; ++p) combinations *= planes.levels();
  float number[256];
  for (size_t c = 0; c < combinations; ++c) {
    F32 sum = zero_f32();
    size_t rest = c, power = combinations, code = 0;
    for (size_t p = 0; p < planes.count; ++p) {
      power /= planes.levels();
      const size_t digit = rest / power;
      rest -= digit * power;
      code += digit << (2 * p);
      const F32 part = mul(planes.value(set1(static_cast<float>(digit))), scales[p]);
      sum = p ? add(sum, part) : part;
    }
    store(planes.sums + 16 * c, sum);
    number[c] = static_cast<float>(code);
  }
  F32 error = zero_f32();
  for (size_t i = 0; i < g.n; ++i) {
    const F32 v = load(g.w + 16 * i);
    F32 best = set1(std::numeric_limits<float>::infinity()), code = zero_f32();
    for (size_t c = 0; c < combinations; ++c) {
      const F32 distance = abs(sub(v, load(planes.sums + 16 * c)));
      code = select_gt(best, distance, set1(number[c]), code);
      best = select_gt(best, distance, distance, best);
    }
    store(codes + 16 * i, code);
    error = add(error, mul(load(g.importance + 16 * i), mul(best, best)));
  }
  return error;
}

// Replaces the scales by those of least squares for these codes.
inline void solve_scales(const Planes& planes, const Group& g, const float* codes, F32* scales) {
  const size_t count = planes.count;
  F32 matrix[8][8], right[8];  // of the matrix, columns from the diagonal on
  for (size_t p = 0; p < count; ++p) {
    right[p] = zero_f32();
    for (size_t q = p; q < count; ++q) matrix[p][q] = zero_f32();
  }
  for (size_t i = 0; i < g.n; ++i) {
    F32 code = load(codes + 16 * i), value[8];
    for (size_t p = 0; p < count; ++p) value[p] = planes.value(next_digit(&code));
    for (size_t p = 0; p < count; ++p) {
      const F32 counted = mul(load(g.importance + 16 * i), value[p]);
      right[p] = add(right[p], mul(counted, load(g.w + 16 * i)));
      for (size_t q = p; q < count; ++q) matrix[p][q] = add(matrix[p][q], mul(counted, value[q]));
    }
  }
  const F32 weight = set1(kRidge * static_cast<float>(g.n));
  for (size_t p = 0; p < count; ++p) {
    matrix[p][p] = add(matrix[p][p], weight);
    right[p] = add(right[p], mul(weight, scales[p]));
  }
  for (size_t k = 0; k < count; ++k) {
    const F32 inverse_pivot = div(set1(1.0f), matrix[k][k]);
    for (size_t p = k + 1; p < count; ++p) {
      const F32 factor = mul(matrix[k][p], inverse_pivot);
      for (size_t q = p; q < count; ++q) matrix[p][q] = sub(matrix[p][q], mul(factor, matrix[k][q]));
      right[p] = sub(right[p], mul(factor, right[k]));
    }
  }
  for (size_t k = count; k-- > 0;) {
    F32 rest = right[k];
    for (size_t p = k + 1; p < count; ++p) rest = sub(rest, mul(matrix[k][p], scales[p]));
    scales[k] = div(rest, matrix[k][k]);
  }
}

// Takes over x[n][16] in the lanes where the error found is smaller.
inline void keep_where_better(F32 error, F32 found, const float* x, size_t n, float* kept) {
  for (size_t i = 0; i < 16 * n; i += 16)
    store(kept + i, select_gt(error, found, load(x + i), load(kept + i)));
}

// Alternates from `scales`, which it replaces; codes and trial: [n][16]. Returns the error.
inline F32 alternate(const Planes& planes, const Group& g, F32* scales, float* codes, float* trial) {
  for (size_t p = 0; p < planes.count; ++p) scales[p] = round_scale(scales[p], planes.scale_type);
  F32 error = assign(planes, g, scales, codes);
  for (int round = 0; round < (planes.ternary ? kTernaryRounds : kBinaryRounds); ++round) {
    F32 candidate[8];
    for (size_t p = 0; p < planes.count; ++p) candidate[p] = scales[p];
    solve_scales(planes, g, codes, candidate);
    for (size_t p = 0; p < planes.count; ++p) candidate[p] = round_scale(candidate[p], planes.scale_type);
    const F32 found = assign(planes, g, candidate, trial);
    if (reduce_max(sub(error, found)) <= 0) break;  // nothing changes from here on
    for (size_t p = 0; p < planes.count; ++p) scales[p] = select_gt(error, found, candidate[p], scales[p]);
    keep_where_better(error, found, trial, g.n, codes);
    error = select_gt(error, found, found, error);
  }
  return error;
}

// Each plane in turn takes the sign of what remains, and its mean magnitude; rest: [n][16].
inline void greedy_signs(const Planes& planes, const Group& g, F32* scales, float* rest) {
  const F32 share = set1(static_cast<float>(1.0 / static_cast<double>(g.n)));
  std::memcpy(rest, g.w, 16 * sizeof(float) * g.n);
  for (size_t p = 0; p < planes.count; ++p) {
    F32 sum = zero_f32();
    for (size_t i = 0; i < g.n; ++i) sum = add(sum, abs(load(rest + 16 * i)));
    const F32 s = mul(sum, share), minus = sub(zero_f32(), s);
    for (size_t i = 0; i < 16 * g.n; i += 16) {
      const F32 v = load(rest + i);
      store(rest + i, sub(v, select_gt(zero_f32(), v, minus, s)));
    }
    scales[p] = s;
  }
}

// The same with the mean of magnitudes above a threshold.
inline void greedy_trits(const Planes& planes, const Group& g, F32* scales, float* rest) {
  const F32 share = set1(static_cast<float>(1.0 / static_cast<double>(g.n))), zero = zero_f32();
  std::memcpy(rest, g.w, 16 * sizeof(float) * g.n);
  for (size_t p = 0; p < planes.count; ++p) {
    F32 sum = zero, large = zero, count = zero;
    for (size_t i = 0; i < g.n; ++i) sum = add(sum, abs(load(rest + 16 * i)));
    const F32 threshold = mul(set1(kThreshold), mul(sum, share));
    for (size_t i = 0; i < g.n; ++i) {
      const F32 magnitude = abs(load(rest + 16 * i));
      large = add(large, select_gt(magnitude, threshold, magnitude, zero));
      count = add(count, select_gt(magnitude, threshold, set1(1.0f), zero));
    }
    const F32 s = div(large, max(count, set1(1.0f))), minus = sub(zero, s);
    for (size_t i = 0; i < 16 * g.n; i += 16) {
      const F32 v = load(rest + i), level = select_gt(v, zero, s, minus);
      store(rest + i, sub(v, select_gt(abs(v), threshold, level, zero)));
    }
    scales[p] = s;
  }
}

// Leaves the codes in codes[n][16] and returns the error; trial and kept: [n][16] scratch.
inline void fit_trits(const RtnJob& job, const Planes& planes, const Group& g, F32* scales, float* codes,
                      float* trial, float* kept) {
  F32 error = zero_f32();
  for (size_t p = 0; p < planes.count; ++p) scales[p] = zero_f32();
  for (size_t i = 0; i < g.n; ++i) {
    const F32 distance = abs(load(g.w + 16 * i));
    store(codes + 16 * i, zero_f32());
    error = add(error, mul(load(g.importance + 16 * i), mul(distance, distance)));
  }
  for (int start = 0; start < 2; ++start) {
    F32 found_scales[8];
    const F32 largest = max(g.high, sub(zero_f32(), g.low));
    if (start == 0)
      for (size_t p = 0; p < planes.count; ++p) found_scales[p] = mul(set1(job.digits[p]), largest);
    else
      greedy_trits(planes, g, found_scales, trial);
    const F32 found = alternate(planes, g, found_scales, kept, trial);
    for (size_t p = 0; p < planes.count; ++p) scales[p] = select_gt(error, found, found_scales[p], scales[p]);
    keep_where_better(error, found, kept, g.n, codes);
    error = select_gt(error, found, found, error);
  }
}

// One group of a format of several planes. scratch: rtn_group_floats(job) floats.
inline void fit_group(const RtnJob& job, const Group& g, size_t group, float* scratch, const Target& out) {
  float *codes = scratch, *trial = codes + 16 * g.n, *kept = trial + 16 * g.n;
  const Planes planes = {job.planes, job.bits == 2, job.scale_type, kept + 16 * g.n};
  F32 scales[8];
  if (planes.ternary) {
    fit_trits(job, planes, g, scales, codes, trial, kept);
  } else {
    greedy_signs(planes, g, scales, trial);
    alternate(planes, g, scales, codes, trial);
  }
  F32 plain = zero_f32();
  for (size_t i = 0; i < g.n; ++i) {
    F32 code = load(codes + 16 * i), rest = load(g.w + 16 * i);
    for (size_t p = 0; p < planes.count; ++p)
      rest = sub(rest, mul(planes.value(next_digit(&code)), scales[p]));
    plain = add(plain, mul(rest, rest));
  }
  add_sums(g, plain, out);
  const size_t blocks = round_up(job.rows, kBlockRows) / kBlockRows;
  for (size_t p = 0; p < planes.count; ++p) {
    const size_t index = ((p * blocks + out.block) * job.groups + group) * kBlockRows + out.tile * kTileRows;
    store_scales(job, add(scales[p], zero_f32()), index, out.live);
    int32_t* words = out.words + p * out.plane_words;
    for (size_t i = 0; i < g.n; i += 4) {
      F32 digits[4];
      I32 word = zero_i32();
      for (size_t j = 0; j < 4 && i + j < g.n; ++j) {
        F32 code = load(codes + 16 * (i + j));
        digits[j] = next_digit(&code);
        store(codes + 16 * (i + j), code);
      }
      for (size_t j = g.n - i < 4 ? g.n - i : 4; j-- > 0;) word = add(shift_left<8>(word), to_i32(digits[j]));
      store_i32(words + 4 * i, word);
    }
  }
}

}  // namespace lowbit::LOWBIT_ISA::rtn
