// The fit of Q6_K to floats. interop/gguf_fit.py says what is computed and why.
#include "isa/gguf_lanes.h"

namespace lowbit::LOWBIT_ISA {

using namespace fit;

namespace {

constexpr int kSignedCandidates = 12;

LOWBIT_INLINE F32 signed_code(F32 w, F32 inv) { return limit(round_even(mul(w, inv)), -32.0f, 31.0f); }

F32 signed_error(const Group& x, F32 scale) {
  const F32 inv = inverse(scale);
  F32 error = zero_f32();
  for (size_t i = 0; i < x.n; ++i) {
    const F32 rest = sub(at(x.w, i), mul(scale, signed_code(at(x.w, i), inv)));
    error = fma(mul(at(x.g, i), rest), rest, error);
  }
  return error;
}

// (<g w, q>, <g q, q>) of the codes that `scale` gives.
void correlate(const Group& x, F32 scale, F32* wq, F32* qq) {
  const F32 inv = inverse(scale);
  *wq = *qq = zero_f32();
  for (size_t i = 0; i < x.n; ++i) {
    const F32 q = signed_code(at(x.w, i), inv), counted = mul(at(x.g, i), q);
    *wq = fma(counted, at(x.w, i), *wq);
    *qq = fma(counted, q, *qq);
  }
}

// The scale of least squared error, of either sign: -32 reaches further than 31.
F32 fit_signed(const Group& x) {
  F32 peak = zero_f32();
  for (size_t i = 0; i < x.n; ++i) peak = max(abs(at(x.w, i)), peak);
  F32 best = mul(peak, set1(1.0f / 31.5f)), gain = zero_f32();
  for (int k = 0; k < kSignedCandidates; ++k) {
    const float share = (0.9f + 0.034f * static_cast<float>(k / 2)) / (k % 2 ? -31.5f : 31.5f);
    F32 wq, qq;
    correlate(x, mul(peak, set1(share)), &wq, &qq);
    const F32 fitted = mul(wq, inverse(qq)), won = mul(fitted, wq);
    best = select_gt(won, gain, fitted, best);
    gain = max(won, gain);
  }
  return best;
}

// w = d sc (code - 32); sc: whole numbers -128 .. 127 of the sixteen groups.
struct Super6 {
  F32 d, sc[16], error;
};

void settle(const Group* groups, Super6* s) {
  s->error = zero_f32();
  for (size_t j = 0; j < 16; ++j) {
    const F32 sc = s->sc[j];
    F32 least = set1(3e38f);
    for (int a = -1; a <= 1; ++a) {
      const F32 other = limit(add(sc, set1(static_cast<float>(a))), -128.0f, 127.0f);
      const F32 error = signed_error(groups[j], mul(s->d, other));
      s->sc[j] = select_gt(least, error, other, s->sc[j]);
      least = min(error, least);
    }
    s->error = add(s->error, least);
  }
}

}  // namespace

void fit_q6_k(const float* w, float* g, size_t live, uint8_t* out) {
  Group groups[16];
  F32 scales[16], top = zero_f32();
  for (size_t j = 0; j < 16; ++j) {
    weigh(w + 256 * j, 16, g + 256 * j);
    groups[j] = {w + 256 * j, g + 256 * j, 16};
    scales[j] = fit_signed(groups[j]);
    top = select_gt(abs(scales[j]), abs(top), scales[j], top);
  }
  Super6 best, trial;
  trial.d = unit_of(top, -1.0f / 128.0f, 128.0f);
  const F32 inv = inverse(trial.d);
  for (size_t j = 0; j < 16; ++j) trial.sc[j] = limit(round_even(mul(scales[j], inv)), -128.0f, 127.0f);
  settle(groups, &trial);
  best = trial;
  for (int round = 0; round < kRounds; ++round) {
    F32 wa = zero_f32(), aa = zero_f32();
    for (size_t j = 0; j < 16; ++j) {
      F32 wq, qq;
      correlate(groups[j], mul(trial.d, trial.sc[j]), &wq, &qq);
      wa = fma(trial.sc[j], wq, wa);
      aa = fma(mul(trial.sc[j], trial.sc[j]), qq, aa);
    }
    trial.d = halves(mul(wa, inverse(aa)));
    settle(groups, &trial);
    best.d = select_gt(best.error, trial.error, trial.d, best.d);
    for (size_t j = 0; j < 16; ++j) best.sc[j] = select_gt(best.error, trial.error, trial.sc[j], best.sc[j]);
    best.error = min(trial.error, best.error);
  }
  const Lanes d(best.d);
  for (size_t l = 0; l < live; ++l) {
    std::memset(out + 210 * l, 0, 210);
    put_half(out + 210 * l + 208, d.v[l]);
  }
  for (size_t j = 0; j < 16; ++j) {
    const Lanes sc(best.sc[j]);
    for (size_t l = 0; l < live; ++l)
      out[210 * l + 192 + j] = static_cast<uint8_t>(static_cast<int8_t>(sc.v[l]));
    const F32 by = inverse(mul(best.d, best.sc[j]));
    for (size_t k = 0; k < 16; ++k) {
      const Lanes q(signed_code(at(groups[j].w, k), by));
      // Weight i of a half of 128: nibble i / 64 of byte i % 64, 2-bit field i / 32 of byte i % 32.
      const size_t i = (16 * j + k) % 128, half = j / 8;
      for (size_t l = 0; l < live; ++l) {
        const int code = static_cast<int>(q.v[l]) + 32;
        out[210 * l + half * 64 + i % 64] |= static_cast<uint8_t>((code & 15) << (i / 64 * 4));
        out[210 * l + 128 + half * 32 + i % 32] |= static_cast<uint8_t>(code >> 4 << (i / 32 * 2));
      }
    }
  }
}

}  // namespace lowbit::LOWBIT_ISA
