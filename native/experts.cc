// Routing and the order of work of a mixture of experts. See experts.h.
#include "experts.h"

#include <algorithm>
#include <cstring>

#include "decoder_kernels.h"

namespace lowbit {
namespace {

// "experts.12.gate": 12, and "gate" in `part`; `count` and above where it is none of them.
size_t expert_number(const std::string& field, size_t count, std::string* part) {
  const std::string prefix = "experts.";
  if (field.compare(0, prefix.size(), prefix) != 0) return count;
  const size_t dot = field.find('.', prefix.size());
  if (dot == std::string::npos) return count;
  const std::string digits = field.substr(prefix.size(), dot - prefix.size());
  if (digits.empty() || digits.size() > 6 || digits.find_first_not_of("0123456789") != std::string::npos)
    return count;
  *part = field.substr(dot + 1);
  return std::stoul(digits);
}

}  // namespace

const Matrix** ExpertLayer::matrix(const std::string& field) {
  if (experts.empty()) return nullptr;
  if (field == "router") return &router;
  std::string part;
  const size_t number = expert_number(field, experts.size(), &part);
  if (number >= experts.size()) return nullptr;
  Expert& e = experts[number];
  return part == "gate" ? &e.gate : part == "up" ? &e.up : part == "down" ? &e.down : nullptr;
}

std::vector<float>* ExpertLayer::vector(const std::string& field) {
  if (experts.empty()) return nullptr;
  if (field == "router_bias") return &router_bias;
  std::string part;
  const size_t number = expert_number(field, experts.size(), &part);
  if (number >= experts.size()) return nullptr;
  Expert& e = experts[number];
  return part == "gate_bias"   ? &e.gate_bias
         : part == "up_bias"   ? &e.up_bias
         : part == "down_bias" ? &e.down_bias
                               : nullptr;
}

void route(const Router& router, float* scores, const float* bias, uint32_t* chosen, float* weights) {
  const size_t n = router.n_experts, k = router.per_token;
  if (bias)
    for (size_t e = 0; e < n; ++e) scores[e] += bias[e];
  // Best first: an equal score goes behind those of lower index.
  for (size_t e = 0; e < n; ++e) {
    size_t place = std::min(e, k);
    while (place > 0 && scores[e] > scores[chosen[place - 1]]) --place;
    if (place == k) continue;
    for (size_t i = std::min(e, k - 1); i > place; --i) chosen[i] = chosen[i - 1];
    chosen[place] = static_cast<uint32_t>(e);
  }
  const float peak = scores[chosen[0]];
  std::sort(chosen, chosen + k);
  const DecoderKernels& kernels = decoder_kernels();
  for (size_t i = 0; i < k; ++i) weights[i] = scores[chosen[i]];
  kernels.exponentials(weights, k, peak, weights);
  float sum = 0;
  if (router.order == RouterOrder::softmax_topk && !router.renormalize) {
    sum = kernels.exp_sum(scores, n, peak, 1.0f);
  } else {
    for (size_t i = 0; i < k; ++i) sum += weights[i];
  }
  for (size_t i = 0; i < k; ++i) weights[i] /= sum;
}

void ExpertPlan::make(const uint32_t* chosen, size_t tokens, const Router& router) {
  const size_t k = router.per_token;
  next_.assign(router.n_experts, 0);
  for (size_t i = 0; i < tokens * k; ++i) ++next_[chosen[i]];
  experts.clear();
  starts.assign(1, 0);
  for (size_t e = 0; e < router.n_experts; ++e) {
    if (next_[e] == 0) continue;
    experts.push_back(static_cast<uint32_t>(e));
    starts.push_back(starts.back() + next_[e]);
    next_[e] = starts[starts.size() - 2];
  }
  rows.resize(tokens * k);
  places.resize(tokens * k);
  for (size_t i = 0; i < tokens * k; ++i) {
    const size_t place = places[i] = next_[chosen[i]]++;
    rows[place] = static_cast<uint32_t>(i / k);
  }
}

size_t ExpertPlan::wave(size_t first, size_t most) const {
  size_t last = first + 1;
  while (last < experts.size() && starts[last + 1] - starts[first] <= most) ++last;
  return last;
}

Activations rows_of(const Activations& a, size_t first, size_t count) {
  Activations some = a;
  some.tokens = count;
  if (a.values) some.values += first * a.in_features;
  some.high += first * a.padded;
  if (a.low) some.low += first * a.padded;
  some.scales += first * a.groups;
  some.sums += first * (a.padded / kSumStride + 1);
  return some;
}

void copy_row(const Activations& a, size_t from, const Activations& b, size_t to, float* values) {
  const size_t sums = a.padded / kSumStride + 1;
  std::memcpy(b.high + to * a.padded, a.high + from * a.padded, a.padded);
  if (a.low) std::memcpy(b.low + to * a.padded, a.low + from * a.padded, a.padded);
  std::memcpy(b.scales + to * a.groups, a.scales + from * a.groups, a.groups * sizeof(float));
  std::memcpy(b.sums + to * sums, a.sums + from * sums, sums * sizeof(int32_t));
  if (values)
    std::memcpy(values + to * a.in_features, a.values + from * a.in_features, a.in_features * sizeof(float));
}

}  // namespace lowbit
