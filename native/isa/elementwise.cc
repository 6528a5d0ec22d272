// Norms, rotations, activations and sums of exponentials, on rows of floats.
#include "decoder_kernels.h"
#include "exponential.h"
#include "quantize.h"
#include "rows.h"

namespace lowbit::LOWBIT_ISA {
namespace {

// x + y + bias, whose vector i is what f(i, vector) sees; y may be null, and bias too.
template <typename F>
LOWBIT_INLINE void add_rows(float* x, const float* y, const float* bias, size_t n, F f) {
  for (size_t i = 0; i < n; i += 16) {
    const size_t left = n - i;
    F32 v = load_up_to(x + i, left);
    if (y) {
      F32 delta = load_up_to(y + i, left);
      if (bias) delta = add(delta, load_up_to(bias + i, left));
      v = add(v, delta);
      store_up_to(x + i, v, left);
    }
    f(i / 16, v);
  }
}

// 1 / sqrt(mean(x^2) + eps) after x += y + bias. Squares of vector i go to running sum i % 4, and the four
// meet in pairs at the end.
F32 add_and_measure(float* x, const float* y, const float* bias, size_t n, float eps) {
  F32 sums[4] = {zero_f32(), zero_f32(), zero_f32(), zero_f32()};
  const size_t whole = n / 64 * 64;
  const auto square = [&](size_t i, F32 v) { sums[i % 4] = fma(v, v, sums[i % 4]); };
  for (size_t i = 0; i < whole; i += 64)
    add_rows(x + i, y ? y + i : nullptr, bias ? bias + i : nullptr, 64, square);
  add_rows(x + whole, y ? y + whole : nullptr, bias ? bias + whole : nullptr, n - whole, square);
  const float sum = reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  return div(set1(1.0f), sqrt(set1(sum / static_cast<float>(n) + eps)));
}

// Makes a row of n floats, out[i] = f(i, lanes), and its integers where row is not null.
template <typename F>
LOWBIT_INLINE void make_row(size_t n, float* out, const IntegerRow* row, F f) {
  Peak peak;
  const size_t whole = n / 64 * 64;
  size_t group = 0;
  for (size_t i = 0; i < whole; i += 64) {
    for (size_t k = 0; k < 64; k += 16) {
      const F32 v = f(i + k, 16);
      store(out + i + k, v);
      peak.see(v);
    }
    if (row) row->scales[group++] = peak.close();
  }
  for (size_t i = whole; i < n; i += 16) {
    const F32 v = f(i, n - i);
    store_up_to(out + i, v, n - i);
    peak.see(v);
  }
  if (!row) return;
  if (whole < n) row->scales[group] = peak.close();
  round_row(out, n, *row, peak.poison);
}

void norm(float* x, const float* y, const float* bias, const float* weight, size_t n, float eps, float* out,
          const IntegerRow* row) {
  const F32 scale = add_and_measure(x, y, bias, n, eps);
  make_row(n, out, row, [&](size_t i, size_t left) __attribute__((always_inline)) {
    return mul(mul(load_up_to(x + i, left), scale), load_up_to(weight + i, left));
  });
}

// sum(f(v)) over vectors v of a row, in four running sums that meet in pairs. f(v, left): lanes from `left`
// on lie behind the row and must come out as 0.
template <typename F>
LOWBIT_INLINE float row_sum(const float* x, size_t n, F f) {
  F32 sums[4] = {zero_f32(), zero_f32(), zero_f32(), zero_f32()};
  for (size_t i = 0; i < n; i += 16) {
    const size_t k = i / 16 % 4;
    sums[k] = add(sums[k], f(load_up_to(x + i, n - i), n - i));
  }
  return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

void layer_norm(float* x, const float* y, const float* bias, const float* weight, const float* shift,
                size_t n, float eps, float* out, const IntegerRow* row) {
  if (y) add_rows(x, y, bias, n, [](size_t, F32) {});
  const float count = static_cast<float>(n);
  const float mean = row_sum(x, n, [](F32 v, size_t) { return v; }) / count;
  alignas(64) float means[16];
  store(means, set1(mean));
  const float variance = row_sum(x, n,
                                 [&](F32 v, size_t left) {
                                   const F32 d = sub(v, load_up_to(means, left));
                                   return mul(d, d);
                                 }) /
                         count;
  const F32 scale = div(set1(1.0f), sqrt(set1(variance + eps))), middle = set1(mean);
  make_row(n, out, row, [&](size_t i, size_t left) __attribute__((always_inline)) {
    const F32 v = mul(sub(load_up_to(x + i, left), middle), scale), w = load_up_to(weight + i, left);
    return shift ? fma(v, w, load_up_to(shift + i, left)) : mul(v, w);
  });
}

void add_row(float* x, const float* y, const float* bias, size_t n, float* out, const IntegerRow* row) {
  if (y) add_rows(x, y, bias, n, [](size_t, F32) {});
  if (out == x && !row) return;
  make_row(n, out, row,
           [&](size_t i, size_t left) __attribute__((always_inline)) { return load_up_to(x + i, left); });
}

void softcap(float* x, size_t n, float cap) {
  for (size_t i = 0; i < n; i += 16) store_up_to(x + i, soft_capped(load_up_to(x + i, n - i), cap), n - i);
}

// x times the share of a normal distribution that is below x. Of the side far from 0 the share is
// 0.5 t P(t) exp(-x^2 / 2) with t = 1 / (1 + 0.3275911 |x| / sqrt(2)), within 8e-8: Abramowitz and Stegun,
// 7.1.26.
LOWBIT_INLINE F32 gelu(F32 x) {
  const F32 one = set1(1.0f), size = abs(x);
  const F32 t = div(one, fma(size, set1(0.231641888f), one));
  F32 p = fma(set1(0.5307027145f), t, set1(-0.7265760135f));
  p = fma(p, t, set1(0.7107068705f));
  p = fma(p, t, set1(-0.142248368f));
  p = fma(p, t, set1(0.127414796f));
  const F32 tail = mul(mul(p, t), exponential(mul(mul(size, size), set1(-0.5f))));
  return mul(x, select_gt(x, zero_f32(), sub(one, tail), tail));
}

template <Activation kind>
LOWBIT_INLINE F32 activation(F32 g) {
  const F32 one = set1(1.0f);
  if (kind == Activation::relu) return max(zero_f32(), g);
  if (kind == Activation::gelu) return gelu(g);
  if (kind == Activation::relu2) {
    const F32 positive = max(zero_f32(), g);
    return mul(positive, positive);
  }
  // The others are g * sigmoid(t): t = g, or t = 1.702 g, or t = 2 sqrt(2 / pi) (g + 0.044715 g^3), since
  // (1 + tanh(t / 2)) / 2 = sigmoid(t).
  F32 minus_t = sub(zero_f32(), g);
  if (kind == Activation::swiglu_clamped) minus_t = mul(g, set1(-1.702f));
  if (kind == Activation::gelu_tanh)
    minus_t = mul(mul(g, set1(-1.5957691216f)), fma(mul(g, g), set1(0.044715f), one));
  return div(g, add(one, exponential(minus_t)));
}

template <Activation kind>
void activate_rows(const float* gate, const float* gate_bias, const float* up, const float* up_bias, size_t n,
                   float* out, const IntegerRow* row) {
  make_row(n, out, row, [&](size_t i, size_t left) __attribute__((always_inline)) {
    F32 g = load_up_to(gate + i, left), u = load_up_to(up + i, left);
    if (gate_bias) g = add(g, load_up_to(gate_bias + i, left));
    if (up_bias) u = add(u, load_up_to(up_bias + i, left));
    if (kind == Activation::swiglu_clamped) {
      const F32 limit = set1(7.0f);
      g = min(limit, g);
      u = add(max(set1(-7.0f), min(limit, u)), set1(1.0f));
    }
    return mul(activation<kind>(g), u);
  });
}

template <Activation kind>
void activate_alone(const float* gate, const float* gate_bias, size_t n, float* out, const IntegerRow* row) {
  make_row(n, out, row, [&](size_t i, size_t left) __attribute__((always_inline)) {
    F32 g = load_up_to(gate + i, left);
    if (gate_bias) g = add(g, load_up_to(gate_bias + i, left));
    return activation<kind>(g);
  });
}

template <Activation kind>
void activate_kind(const float* gate, const float* gate_bias, const float* up, const float* up_bias, size_t n,
                   float* out, const IntegerRow* row) {
  if (up)
    activate_rows<kind>(gate, gate_bias, up, up_bias, n, out, row);
  else
    activate_alone<kind>(gate, gate_bias, n, out, row);
}

void activate(Activation kind, const float* gate, const float* gate_bias, const float* up,
              const float* up_bias, size_t n, float* out, const IntegerRow* row) {
  switch (kind) {
    case Activation::silu:
      return activate_kind<Activation::silu>(gate, gate_bias, up, up_bias, n, out, row);
    case Activation::relu2:
      return activate_kind<Activation::relu2>(gate, gate_bias, up, up_bias, n, out, row);
    case Activation::gelu_tanh:
      return activate_kind<Activation::gelu_tanh>(gate, gate_bias, up, up_bias, n, out, row);
    case Activation::gelu:
      return activate_kind<Activation::gelu>(gate, gate_bias, up, up_bias, n, out, row);
    case Activation::relu:
      return activate_kind<Activation::relu>(gate, gate_bias, up, up_bias, n, out, row);
    case Activation::swiglu_clamped:  // always gated
      return activate_rows<Activation::swiglu_clamped>(gate, gate_bias, up, up_bias, n, out, row);
  }
}

void prepare_head(const HeadPreparation& p, const float* x, float* out) {
  for (size_t i = 0; i < p.head_dim; i += 16) {
    const size_t left = p.head_dim - i;
    F32 v = load_up_to(x + i, left);
    if (p.bias) v = add(v, load_up_to(p.bias + i, left));
    store_up_to(out + i, v, left);
  }
  if (p.norm) norm(out, nullptr, nullptr, p.norm, p.head_dim, p.norm_eps, out, nullptr);
  if (p.cosine) {
    for (size_t i = 0; i < p.half; i += 16) {
      const size_t left = p.half - i;
      const F32 a = load_up_to(out + i, left), b = load_up_to(out + p.half + i, left);
      const F32 c = load_up_to(p.cosine + i, left), s = load_up_to(p.sine + i, left);
      store_up_to(out + i, fma(a, c, sub(zero_f32(), mul(b, s))), left);
      store_up_to(out + p.half + i, fma(b, c, mul(a, s)), left);
    }
  }
  const F32 scale = set1(p.scale);
  for (size_t i = 0; i < p.head_dim; i += 16) {
    const size_t left = p.head_dim - i;
    store_up_to(out + i, mul(load_up_to(out + i, left), scale), left);
  }
}

float largest(const float* x, size_t n) {
  F32 a = set1(x[0]), b = a;
  size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    a = max(a, load(x + i));
    b = max(b, load(x + i + 16));
  }
  float peak = reduce_max(max(a, b));
  for (; i < n; ++i) peak = x[i] > peak ? x[i] : peak;
  return peak;
}

float exp_sum(const float* x, size_t n, float peak, float inverse_temperature) {
  const F32 p = set1(peak), t = set1(inverse_temperature);
  F32 sums[4] = {zero_f32(), zero_f32(), zero_f32(), zero_f32()};
  size_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (size_t k = 0; k < 4; ++k) sums[k] = add(sums[k], exponential(mul(sub(load(x + i + 16 * k), p), t)));
  for (size_t k = 0; i < n; i += 16, ++k) {
    float tail[16];
    const size_t left = n - i < 16 ? n - i : 16;
    for (size_t j = 0; j < 16; ++j) tail[j] = j < left ? x[i + j] : -__builtin_inff();
    sums[k] = add(sums[k], exponential(mul(sub(load(tail), p), t)));
  }
  return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

}  // namespace

void add_elementwise_kernels(DecoderKernels& table) {
  table.norm = norm;
  table.layer_norm = layer_norm;
  table.add = add_row;
  table.softcap = softcap;
  table.activate = activate;
  table.prepare_head = prepare_head;
  table.largest = largest;
  table.exp_sum = exp_sum;
}

}  // namespace lowbit::LOWBIT_ISA
