// Round-to-nearest of one tile: a row in each of 16 lanes, so that every lane adds in index order and gives
// the same bits as quantize/search.py and quantize/affine.py, which say what is computed and why.
#include "rtn.h"

#include <cstring>

#include "isa/rtn_fit.h"
#include "isa/rtn_m4.h"
#include "isa/rtn_search.h"
#include "isa/rtn_write.h"

namespace lowbit::LOWBIT_ISA {

namespace {

using namespace rtn;

template <typename Levels>
Best search_table(const RtnJob& job, const LevelTable& t, const Group& g, const Levels& levels) {
  Best best = {starting_scale(job, t, g), zero_f32(), zero_f32()};
  best.error = evaluate(g, mul(best.scale, set1(t.step)), levels).error;
  if (!job.mse) return best;
  const bool fine = is_fine(job.scale_type);
  const F32 minus = set1(-1.0f);
  F32 most = zero_f32(), refit = best.scale;
  for (int sign = 0; sign < (t.both_signs ? 2 : 1); ++sign) {
    const F32 cover =
        sign ? covering_scale(mul(g.low, minus), mul(g.high, minus), t) : covering_scale(g.high, g.low, t);
    F32 scale, ratio;
    candidate_bounds(cover, g.rms, t, &scale, &ratio);
    for (int k = 0; k <= 1 << t.roots; ++k) {
      const F32 signed_scale = sign ? mul(scale, minus) : scale;
      if (fine) {
        const Sums s = correlate(g, inverse(mul(signed_scale, set1(t.step))), levels);
        F32 fitted;
        const F32 gain = gain_of(s, !t.both_signs, &fitted);
        refit = select_gt(gain, most, mul(fitted, set1(1.0f / t.step)), refit);
        most = select_gt(gain, most, gain, most);
      } else {
        keep_better(job, g, levels, t.step, signed_scale, zero_f32(), &best);
      }
      scale = mul(scale, ratio);
    }
  }
  if (fine)
    for (int i = 0; i < kRefinements; ++i)
      refit = keep_better(job, g, levels, t.step, refit, zero_f32(), &best);
  return best;
}

Best search_affine(const RtnJob& job, const LevelTable& t, const Group& g) {
  const float top_code = static_cast<float>(t.count - 1);
  const F32 top = set1(top_code);
  const F32 cover = mul(sub(g.high, g.low), set1(1.0f / top_code));
  Best best = {round_scale(cover, job.scale_type), zero_f32(), zero_f32()};
  const F32 below = sub(zero_f32(), g.low);
  best.zero = clamp(round_even(mul(below, inverse(best.scale))), zero_f32(), top);
  best.error = evaluate(g, best.scale, Affine{best.zero, top}).error;
  if (!job.mse) return best;
  const bool fine = is_fine(job.scale_type);
  const F32 middle = mul(add(g.high, g.low), set1(0.5f));
  F32 scale, ratio, most = zero_f32(), refit = best.scale, refit_zero = best.zero;
  candidate_bounds(cover, g.rms, t, &scale, &ratio);
  for (int k = 0; k <= 1 << t.roots; ++k) {
    const F32 centre = round_even(sub(mul(top, set1(0.5f)), mul(middle, inverse(scale))));
    for (int shift = -1; shift <= 1; ++shift) {
      const F32 zero = clamp(add(centre, set1(static_cast<float>(shift))), zero_f32(), top);
      const Affine levels = {zero, top};
      if (fine) {
        F32 fitted;
        const F32 gain = gain_of(correlate(g, inverse(scale), levels), true, &fitted);
        refit = select_gt(gain, most, fitted, refit);
        refit_zero = select_gt(gain, most, zero, refit_zero);
        most = select_gt(gain, most, gain, most);
      } else {
        keep_better(job, g, levels, 1.0f, scale, zero, &best);
      }
    }
    scale = mul(scale, ratio);
  }
  if (fine)
    for (int i = 0; i < kRefinements; ++i)
      refit = keep_better(job, g, Affine{refit_zero, top}, 1.0f, refit, refit_zero, &best);
  return best;
}

// Calls work(levels) with the kind of levels that suits the table.
template <typename Work>
void with_levels(const LevelTable& t, const Work& work) {
  if (t.linear)
    work(Linear(t));
  else if (t.count <= kChainLevels)
    work(Chain(t));
  else
    work(Lookup(t));
}

Best search(const RtnJob& job, const LevelTable& t, const Group& g) {
  if (job.affine) return search_affine(job, t, g);
  Best best;
  with_levels(t, [&](const auto& levels) { best = search_table(job, t, g, levels); });
  return best;
}

// A group with a scale of its own.
void quantize_group(const RtnJob& job, const Group& g, size_t group, const Target& out) {
  Best best = search(job, job.tables[0], g);
  F32 selector = zero_f32();
  for (size_t t = 1; t < job.tables.size(); ++t) {
    const Best other = search(job, job.tables[t], g);
    selector = select_gt(best.error, other.error, set1(static_cast<float>(t)), selector);
    best.scale = select_gt(best.error, other.error, other.scale, best.scale);
    best.error = select_gt(best.error, other.error, other.error, best.error);
  }
  F32 plain = zero_f32();
  for (size_t t = 0; t < job.tables.size(); ++t) {
    const LevelTable& table = job.tables[t];
    const F32 unit = mul(best.scale, set1(table.step)), number = set1(static_cast<float>(t));
    if (job.affine) {
      const Affine levels = {best.zero, set1(static_cast<float>(table.count - 1))};
      plain = add(plain, write_codes(g, best.scale, levels, selector, number, out.words));
    } else {
      with_levels(table, [&](const auto& levels) {
        plain = add(plain, write_codes(g, unit, levels, selector, number, out.words));
      });
    }
  }
  const size_t index = (out.block * job.groups + group) * kBlockRows + out.tile * kTileRows;
  store_scales(job, add(best.scale, zero_f32()), index, out.live);  // minus zero becomes zero
  if (job.zero_points) store_bytes(best.zero, job.zero_points + index, out.live);
  if (job.selectors) store_bytes(selector, job.selectors + index, out.live);
  add_sums(g, plain, out);
}

// The groups of one super-group with m4 scales; `out.words` are those of its first group.
void quantize_super_group(const RtnJob& job, const SuperGroup& s, size_t number, const Target& out) {
  const LevelTable& table = job.tables[0];
  with_levels(table, [&](const auto& levels) {
    const F32 scale = search_m4(job, table, s, levels);
    const size_t supers = job.groups / job.together;
    const size_t index = (out.block * supers + number) * kBlockRows + out.tile * kTileRows;
    store_scales(job, add(scale, zero_f32()), index, out.live);
    for (size_t j = 0; j < s.count; ++j) {
      const Group g = s.group(j);
      const F32 m = load(s.best + 16 * j);
      const F32 unit = mul(mul(scale, m), set1(table.step));
      Target part = out;
      part.words += 4 * g.n * j;
      add_sums(g, write_codes(g, unit, levels, zero_f32(), zero_f32(), part.words), part);
      uint8_t bytes[16];
      store_bytes(m, bytes, out.live);
      uint8_t* nibbles = job.multipliers + (out.block * job.groups + number * s.count + j) * kTileRows;
      for (size_t row = 0; row < out.live; ++row)
        nibbles[row] = static_cast<uint8_t>(nibbles[row] | bytes[row] << (4 * out.tile));
    }
  });
}

}  // namespace

// One tile of 16 rows. Preconditions: the tile has at least one row; outputs hold padding; scratch is aligned
// to 64 bytes and holds rtn_scratch_bytes(job).
void rtn_tile(const RtnJob& job, size_t block, size_t tile, uint8_t* scratch) {
  const size_t first = block * kBlockRows + tile * kTileRows;
  const size_t live = job.rows - first < kTileRows ? job.rows - first : kTileRows;
  const size_t padded = round_up(job.columns, job.base3 ? kBase3Inputs : kChunk);
  const size_t n = job.group_size * job.together;  // inputs that share a scale
  float* w = reinterpret_cast<float*>(scratch);
  float* importance = w + kTileRows * n;
  float* of_groups = importance + kTileRows * n;
  uint8_t* steps = reinterpret_cast<uint8_t*>(of_groups + rtn_group_floats(job));
  const size_t plane_bytes = kTileRows * padded;
  std::memset(steps, 0, plane_bytes * job.planes);
  if (live < kTileRows) std::memset(w, 0, kTileRows * sizeof(float) * n);
  double error = 0, square = 0;
  for (size_t number = 0; number < job.groups / job.together; ++number) {
    const float* source = job.weights + first * job.columns + number * n;
    for (size_t row = 0; row < live; ++row)
      for (size_t i = 0; i < n; ++i) w[16 * i + row] = source[row * job.columns + i];
    if (job.divisor != 1.0f)
      for (size_t i = 0; i < n; ++i) store(w + 16 * i, div(load(w + 16 * i), set1(job.divisor)));
    int32_t* words = reinterpret_cast<int32_t*>(steps) + 4 * number * n;
    const Target out = {block, tile, live, words, plane_bytes / sizeof(int32_t), &error, &square};
    const float* counts = job.counts ? job.counts + number * n : nullptr;
    if (job.multipliers) {
      const SuperGroup s(job, number * n, w, importance, of_groups);
      quantize_super_group(job, s, number, out);
    } else if (job.planes > 1) {
      fit_group(job, describe(w, importance, n, true, counts), number, of_groups, out);
    } else {
      quantize_group(job, describe(w, importance, n, job.weigh, counts), number, out);
    }
  }
  for (size_t p = 0; p < job.planes; ++p)
    pack(job, block, tile, live, padded, steps + p * plane_bytes, job.codes + p * job.plane_codes);
  job.errors[block] += error;
  job.squares[block] += square;
}

}  // namespace lowbit::LOWBIT_ISA
