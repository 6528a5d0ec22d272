// Fits of Q4_1 and Q4_K to floats. interop/gguf_fit.py says what is computed and why; the byte layouts are
// those of repack.cc.
#include "isa/gguf_lanes.h"

namespace lowbit::LOWBIT_ISA {

using namespace fit;

namespace {

constexpr int kCandidates = 11;

// w = scale * q - least, q in 0 .. 15.
struct Affine {
  F32 scale, least, error;
};

LOWBIT_INLINE F32 affine_code(F32 w, F32 inv, F32 least) {
  return limit(round_even(mul(add(w, least), inv)), 0.0f, 15.0f);
}

F32 affine_error(const Group& x, F32 scale, F32 least) {
  const F32 inv = inverse(scale);
  F32 error = zero_f32();
  for (size_t i = 0; i < x.n; ++i) {
    const F32 q = affine_code(at(x.w, i), inv, least);
    const F32 rest = sub(add(at(x.w, i), least), mul(scale, q));
    error = fma(mul(at(x.g, i), rest), rest, error);
  }
  return error;
}

// The scale and least of least squares for the codes that (scale, least) gives. Unless `any`, least >= 0.
void refit(const Group& x, bool any, F32* scale, F32* least) {
  const F32 inv = inverse(*scale);
  F32 g = zero_f32(), gw = g, gq = g, gqq = g, gwq = g;
  for (size_t i = 0; i < x.n; ++i) {
    const F32 w = at(x.w, i), q = affine_code(w, inv, *least), weight = at(x.g, i), counted = mul(weight, q);
    g = add(g, weight);
    gw = fma(weight, w, gw);
    gq = add(gq, counted);
    gqq = fma(counted, q, gqq);
    gwq = fma(counted, w, gwq);
  }
  const F32 determinant = sub(mul(g, gqq), mul(gq, gq)), by = inverse(determinant);
  F32 s = mul(sub(mul(g, gwq), mul(gw, gq)), by);
  F32 m = mul(sub(mul(gq, gwq), mul(gqq, gw)), by);  // -offset
  const F32 plain = mul(gwq, inverse(gqq));
  if (!any) {
    s = select_gt(zero_f32(), m, plain, s);
    m = max(m, zero_f32());
  }
  // One code for all weights: no slope can be told.
  const F32 sure = mul(set1(1e-6f), mul(g, gqq));
  *scale = select_gt(determinant, sure, s, *scale);
  *least = select_gt(determinant, sure, m, *least);
}

// Takes over what the codes of (scale, least) give by least squares where that is better.
void take_refitted(const Group& x, bool any, F32 scale, F32 least, Affine* best) {
  refit(x, any, &scale, &least);
  const F32 error = affine_error(x, scale, least);
  best->scale = select_gt(best->error, error, scale, best->scale);
  best->least = select_gt(best->error, error, least, best->least);
  best->error = min(error, best->error);
}

Affine fit_affine(const Group& x, bool any) {
  F32 high = at(x.w, 0), low = high;
  for (size_t i = 1; i < x.n; ++i) {
    high = max(high, at(x.w, i));
    low = min(low, at(x.w, i));
  }
  if (!any) low = min(low, zero_f32());
  const F32 cover = mul(sub(high, low), set1(1.0f / 15.0f)), middle = mul(add(high, low), set1(0.5f));
  Affine best = {cover, sub(zero_f32(), low), zero_f32()};
  best.error = affine_error(x, best.scale, best.least);
  for (int k = 0; k < kCandidates; ++k) {
    F32 scale = mul(cover, set1(0.66f + 0.038f * static_cast<float>(k)));
    F32 least = sub(mul(scale, set1(7.5f)), middle);
    if (!any) least = max(least, zero_f32());
    take_refitted(x, any, scale, least, &best);
  }
  for (int turn = 0; turn < kRefits; ++turn) take_refitted(x, any, best.scale, best.least, &best);
  return best;
}

}  // namespace

void fit_q4_1(const float* w, float* g, size_t live, uint8_t* out) {
  weigh(w, 32, g);
  const Group x{w, g, 32};
  const Affine fit = fit_affine(x, true);
  F32 scale = halves(fit.scale), least = halves(fit.least);
  F32 error = affine_error(x, scale, least);
  for (int turn = 0; turn < kRefits; ++turn) {  // what rounding to fp16 has moved
    F32 s = scale, m = least;
    refit(x, true, &s, &m);
    s = halves(s);
    m = halves(m);
    const F32 found = affine_error(x, s, m);
    scale = select_gt(error, found, s, scale);
    least = select_gt(error, found, m, least);
    error = min(found, error);
  }
  const F32 inv = inverse(scale);
  const Lanes d(scale), m(sub(zero_f32(), least));
  for (size_t l = 0; l < live; ++l) {
    std::memset(out + 20 * l, 0, 20);
    put_half(out + 20 * l, d.v[l]);
    put_half(out + 20 * l + 2, m.v[l]);
  }
  for (size_t i = 0; i < 32; ++i) {
    const Lanes q(affine_code(at(w, i), inv, least));
    for (size_t l = 0; l < live; ++l)
      out[20 * l + 4 + i % 16] |= static_cast<uint8_t>(static_cast<int>(q.v[l]) << (i / 16 * 4));
  }
}

namespace {

// A super-block of Q4_K: w = d sc q - dmin m. sc, m: whole numbers 0 .. 63 of the eight groups.
struct Super4 {
  F32 d, dmin, sc[8], m[8], error;
};

void keep(Super4* best, const Super4& other) {
  best->d = select_gt(best->error, other.error, other.d, best->d);
  best->dmin = select_gt(best->error, other.error, other.dmin, best->dmin);
  for (size_t j = 0; j < 8; ++j) {
    best->sc[j] = select_gt(best->error, other.error, other.sc[j], best->sc[j]);
    best->m[j] = select_gt(best->error, other.error, other.m[j], best->m[j]);
  }
  best->error = min(other.error, best->error);
}

// The whole numbers beside the given ones that fit best with this d and dmin.
void settle(const Group* groups, Super4* s) {
  s->error = zero_f32();
  for (size_t j = 0; j < 8; ++j) {
    const F32 sc = s->sc[j], m = s->m[j];
    F32 least = set1(3e38f);
    for (int a = -1; a <= 1; ++a)
      for (int b = -1; b <= 1; ++b) {
        const F32 other_sc = limit(add(sc, set1(static_cast<float>(a))), 0.0f, 63.0f);
        const F32 other_m = limit(add(m, set1(static_cast<float>(b))), 0.0f, 63.0f);
        const F32 error = affine_error(groups[j], mul(s->d, other_sc), mul(s->dmin, other_m));
        s->sc[j] = select_gt(least, error, other_sc, s->sc[j]);
        s->m[j] = select_gt(least, error, other_m, s->m[j]);
        least = min(error, least);
      }
    s->error = add(s->error, least);
  }
}

// d and dmin of least squares for the codes that *s gives.
void refit_super(const Group* groups, Super4* s) {
  F32 aa = zero_f32(), ab = aa, bb = aa, wa = aa, wb = aa;
  for (size_t j = 0; j < 8; ++j) {
    const F32 least = mul(s->dmin, s->m[j]), inv = inverse(mul(s->d, s->sc[j]));
    F32 q1 = zero_f32(), qq = q1, wq = q1, w1 = q1, g1 = q1;
    for (size_t i = 0; i < 32; ++i) {
      const F32 w = at(groups[j].w, i), g = at(groups[j].g, i), q = affine_code(w, inv, least);
      const F32 counted = mul(g, q);
      q1 = add(q1, counted);
      qq = fma(counted, q, qq);
      wq = fma(counted, w, wq);
      w1 = fma(g, w, w1);
      g1 = add(g1, g);
    }
    aa = fma(mul(s->sc[j], s->sc[j]), qq, aa);
    ab = fma(mul(s->sc[j], s->m[j]), q1, ab);
    bb = fma(mul(s->m[j], s->m[j]), g1, bb);
    wa = fma(s->sc[j], wq, wa);
    wb = fma(s->m[j], w1, wb);
  }
  const F32 determinant = sub(mul(aa, bb), mul(ab, ab)), by = inverse(determinant);
  const F32 sure = mul(set1(1e-6f), mul(aa, bb)), alone = mul(wa, inverse(aa));
  const F32 d = select_gt(determinant, sure, mul(sub(mul(wa, bb), mul(ab, wb)), by), alone);
  const F32 dmin = select_gt(determinant, sure, mul(sub(mul(wa, ab), mul(aa, wb)), by), s->dmin);
  s->d = halves(max(d, zero_f32()));
  s->dmin = halves(max(dmin, zero_f32()));
}

}  // namespace

void fit_q4_k(const float* w, float* g, size_t live, uint8_t* out) {
  Group groups[8];
  F32 scales[8], leasts[8], top = zero_f32(), deepest = zero_f32();
  for (size_t j = 0; j < 8; ++j) {
    weigh(w + 512 * j, 32, g + 512 * j);
    groups[j] = {w + 512 * j, g + 512 * j, 32};
    const Affine fit = fit_affine(groups[j], false);
    scales[j] = max(fit.scale, zero_f32());
    leasts[j] = fit.least;
    top = max(scales[j], top);
    deepest = max(leasts[j], deepest);
  }
  Super4 best;
  for (int start = 0; start < 2; ++start) {  // the largest factor at 63, or a little beyond it
    const float span = start ? 1.0f / 61.0f : 1.0f / 63.0f;
    Super4 trial;
    trial.d = unit_of(top, span, 63.0f);
    trial.dmin = unit_of(deepest, span, 63.0f);
    const F32 inv = inverse(trial.d), inv_min = inverse(trial.dmin);
    for (size_t j = 0; j < 8; ++j) {
      trial.sc[j] = limit(round_even(mul(scales[j], inv)), 0.0f, 63.0f);
      trial.m[j] = limit(round_even(mul(leasts[j], inv_min)), 0.0f, 63.0f);
    }
    settle(groups, &trial);
    if (start)
      keep(&best, trial);
    else
      best = trial;
    for (int round = 0; round < kRounds; ++round) {
      refit_super(groups, &trial);
      settle(groups, &trial);
      keep(&best, trial);
    }
  }
  const Lanes d(best.d), dmin(best.dmin);
  for (size_t l = 0; l < live; ++l) {
    std::memset(out + 144 * l, 0, 144);
    put_half(out + 144 * l, d.v[l]);
    put_half(out + 144 * l + 2, dmin.v[l]);
  }
  for (size_t j = 0; j < 8; ++j) {
    const Lanes sc(best.sc[j]), m(best.m[j]);
    for (size_t l = 0; l < live; ++l) {
      uint8_t* packed = out + 144 * l + 4;
      const int a = static_cast<int>(sc.v[l]), b = static_cast<int>(m.v[l]);
      if (j < 4) {
        packed[j] |= static_cast<uint8_t>(a);
        packed[j + 4] |= static_cast<uint8_t>(b);
      } else {
        packed[j + 4] = static_cast<uint8_t>((a & 15) | (b & 15) << 4);
        packed[j - 4] |= static_cast<uint8_t>(a >> 4 << 6);
        packed[j] |= static_cast<uint8_t>(b >> 4 << 6);
      }
    }
    const F32 inv = inverse(mul(best.d, best.sc[j])), least = mul(best.dmin, best.m[j]);
    for (size_t i = 0; i < 32; ++i) {
      const Lanes q(affine_code(at(groups[j].w, i), inv, least));
      for (size_t l = 0; l < live; ++l)
        out[144 * l + 16 + j / 2 * 32 + i] |= static_cast<uint8_t>(static_cast<int>(q.v[l]) << (j % 2 * 4));
    }
  }
}

void fit_tile(int number, const float* weights, size_t live, uint8_t* out, float* scratch) {
  const size_t n = number == 3 ? 32 : 256;
  float *w = scratch, *g = scratch + 16 * n;
  for (size_t i = 0; i < n; ++i)
    for (size_t l = 0; l < 16; ++l) w[16 * i + l] = l < live ? weights[l * n + i] : 0.0f;
  if (number == 3) fit_q4_1(w, g, live, out);
  if (number == 12) fit_q4_k(w, g, live, out);
  if (number == 14) fit_q6_k(w, g, live, out);
}

}  // namespace lowbit::LOWBIT_ISA
