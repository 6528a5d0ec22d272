// See sampler.h. Everything that decides is plain C++ in double precision; the passes over the whole
// vocabulary (largest of every 64, sums of exponentials) are vector kernels that give the same bits
// everywhere.
#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "decoder_kernels.h"

namespace lowbit {
namespace {

constexpr size_t kBlock = 64;  // logits per entry of maxima_
constexpr float kNothing = -std::numeric_limits<float>::infinity();

void require(bool good, const char* name, double value, const char* allowed) {
  if (good) return;
  throw std::invalid_argument(std::string("Sampler: ") + name + "=" + std::to_string(value) + " must be " +
                              allowed);
}

// The finaliser of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64 bits that passes BigCrush as a
// stream.
uint64_t scramble(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Everything that the mask does not allow becomes -inf.
void keep_allowed(float* logits, size_t vocab, const uint32_t* mask) {
  for (size_t begin = 0; begin < vocab; begin += 32) {
    const uint32_t word = mask[begin / 32];
    if (word == UINT32_MAX) continue;
    const size_t n = std::min<size_t>(32, vocab - begin);
    for (size_t i = 0; i < n; ++i)
      if (!(word >> i & 1)) logits[begin + i] = kNothing;
  }
}

}  // namespace

LogitChunk scan_chunk(const float* logits, size_t vocab, size_t chunk) {
  const DecoderKernels& kernels = decoder_kernels();
  const float* x = logits + chunk * kLogitChunk;
  const size_t n = std::min(kLogitChunk, vocab - chunk * kLogitChunk);
  LogitChunk result;
  result.peak = kernels.largest(x, n);
  // A chunk of -inf adds nothing; with -inf as the peak it would look like NaN.
  const bool nothing =
      result.peak == kNothing && std::all_of(x, x + n, [](float v) { return v == kNothing; });
  result.sum = nothing ? 0.0f : kernels.exp_sum(x, n, result.peak, 1.0f);
  return result;
}

LogitStats join_chunks(const LogitChunk* chunks, size_t count) {
  LogitStats stats;
  stats.peak = kNothing;
  double sum = 0;
  for (size_t i = 0; i < count; ++i) {
    stats.peak = std::max(stats.peak, chunks[i].peak);
    if (std::isnan(chunks[i].sum)) sum = chunks[i].sum;
  }
  for (size_t i = 0; i < count; ++i)
    if (chunks[i].sum != 0)
      sum += static_cast<double>(chunks[i].sum) * std::exp(static_cast<double>(chunks[i].peak) - stats.peak);
  stats.log_sum = stats.peak + std::log(sum);
  return stats;
}

Sampler::Sampler(const SamplerOptions& options) : options_(options) {
  const SamplerOptions& o = options;
  require(o.temperature == 0 || (o.temperature >= 1e-4 && o.temperature <= 1e4), "temperature", o.temperature,
          "0 (greedy) or 0.0001 to 10000");
  require(o.top_p > 0 && o.top_p <= 1, "top_p", o.top_p, "above 0 and at most 1");
  require(o.min_p >= 0 && o.min_p <= 1, "min_p", o.min_p, "0 to 1");
  require(o.repetition_penalty >= 0.01 && o.repetition_penalty <= 100, "repetition_penalty",
          o.repetition_penalty, "0.01 to 100");
  require(std::fabs(o.presence_penalty) <= 1e4, "presence_penalty", o.presence_penalty, "-10000 to 10000");
  require(std::fabs(o.frequency_penalty) <= 1e4, "frequency_penalty", o.frequency_penalty, "-10000 to 10000");
  for (const auto& [id, bias] : o.logit_bias) {
    require(id >= 0, "token of logit_bias", id, "0 or more");
    require(std::fabs(bias) <= 1e4f, "logit_bias", static_cast<double>(bias), "-10000 to 10000");
  }
  for (int32_t id : o.forbid) require(id >= 0, "token of forbid", id, "0 or more");
  require(o.top_logprobs <= 10000, "top_logprobs", static_cast<double>(o.top_logprobs), "at most 10000");
}

void Sampler::observe(const int32_t* tokens, size_t count) {
  if (!penalizes()) return;
  for (size_t i = 0; i < count; ++i) ++history_[tokens[i]];
}

void Sampler::commit() {
  if (chosen_ < 0) return;
  observe(&chosen_, 1);
  chosen_ = -1;
  ++steps_;
}

void Sampler::reserve(size_t vocab) {
  maxima_.reserve(vocab / kBlock + 1);
  sorted_.reserve(vocab / kBlock + 1);
  changed_.reserve(history_.size() + options_.logit_bias.size() + options_.forbid.size());
  for (const auto& [id, bias] : options_.logit_bias)
    if (static_cast<size_t>(id) >= vocab)
      throw std::invalid_argument("Sampler: logit_bias names token " + std::to_string(id) +
                                  ", but there are " + std::to_string(vocab) + " tokens; leave it out");
}

bool Sampler::penalizes() const {
  return options_.repetition_penalty != 1 || options_.presence_penalty != 0 ||
         options_.frequency_penalty != 0;
}

double Sampler::uniform() const {
  const uint64_t bits =
      scramble(scramble(options_.seed + 0x9e3779b97f4a7c15u) ^ (steps_ * 0xd1b54a32d192ed03u));
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

void Sampler::change(float* logits, int32_t id, double value) {
  changed_.emplace_back(id, logits[id]);
  logits[id] = static_cast<float>(value);
}

void Sampler::adjust(float* logits, size_t vocab) {
  if (steps_ < options_.forbid_until)
    for (int32_t id : options_.forbid)
      if (static_cast<size_t>(id) < vocab) change(logits, id, kNothing);
  for (const auto& [id, bias] : options_.logit_bias)
    change(logits, id, static_cast<double>(logits[id]) + bias);
  if (!penalizes()) return;
  for (const auto& [id, count] : history_) {
    if (static_cast<size_t>(id) >= vocab) continue;
    const double x = logits[id], penalty = options_.repetition_penalty;
    const double y = x > 0 ? x / penalty : x * penalty;
    change(logits, id, y - options_.presence_penalty - options_.frequency_penalty * count);
  }
}

// Fills top_ with the `count` likeliest tokens of a row whose maxima_ are known.
void Sampler::find_top(const float* logits, size_t vocab, const LogitStats& stats, size_t count) {
  top_.clear();
  if (count == 0) return;
  collect(logits, vocab, std::min(count, vocab));
  count = std::min(count, pool_.size());
  std::partial_sort(pool_.begin(), pool_.begin() + static_cast<ptrdiff_t>(count), pool_.end(), before);
  for (size_t i = 0; i < count; ++i)
    top_.emplace_back(pool_[i].id, static_cast<float>(pool_[i].logit - stats.log_sum));
}

void Sampler::find_maxima(const float* logits, size_t vocab) {
  const auto largest = decoder_kernels().largest;
  maxima_.clear();
  for (size_t i = 0; i < vocab; i += kBlock)
    maxima_.push_back(largest(logits + i, std::min(kBlock, vocab - i)));
}

// Fills pool_, in order of id, with at least `wanted` of the largest logits (all that are not -inf, if fewer)
// and everything that ties with them: the wanted-th largest block maximum is a bound with enough logits above
// it.
void Sampler::collect(const float* logits, size_t vocab, size_t wanted) {
  float bound = kNothing;
  if (wanted <= maxima_.size()) {
    sorted_ = maxima_;
    const auto place = sorted_.begin() + static_cast<ptrdiff_t>(wanted - 1);
    std::nth_element(sorted_.begin(), place, sorted_.end(), std::greater<float>());
    bound = *place;
  }
  pool_.clear();
  for (size_t block = 0; block < maxima_.size(); ++block) {
    if (maxima_[block] < bound) continue;
    const size_t end = std::min(vocab, (block + 1) * kBlock);
    for (size_t i = block * kBlock; i < end; ++i)
      if (logits[i] >= bound && logits[i] != kNothing)
        pool_.push_back({logits[i], static_cast<int32_t>(i), 0});
  }
}

// Orders pool_ so that its first n entries are the likeliest ones that together hold `mass`; returns n.
size_t Sampler::mass_prefix(double mass) {
  size_t low = 0, high = pool_.size();
  double held = 0;  // of pool_[0 .. low), all before everything from low on
  while (high - low > 32) {
    const size_t middle = low + (high - low) / 2;
    const auto begin = pool_.begin();
    std::nth_element(begin + static_cast<ptrdiff_t>(low), begin + static_cast<ptrdiff_t>(middle),
                     begin + static_cast<ptrdiff_t>(high), before);
    double half = 0;
    for (size_t i = low; i < middle; ++i) half += pool_[i].weight;
    if (held + half >= mass) {
      high = middle;
    } else {
      held += half;
      low = middle;
    }
  }
  std::sort(pool_.begin() + static_cast<ptrdiff_t>(low), pool_.begin() + static_cast<ptrdiff_t>(high),
            before);
  for (; low < high; ++low) {
    held += pool_[low].weight;
    if (held >= mass) return low + 1;
  }
  return high;
}

// A token in proportion to its probability, from the whole vocabulary.
int32_t Sampler::pick_any(const float* logits, size_t vocab, float peak) {
  const auto exp_sum = decoder_kernels().exp_sum;
  const float inverse = static_cast<float>(1.0 / options_.temperature);
  sorted_.clear();
  double total = 0;
  for (size_t i = 0; i < vocab; i += kBlock) {
    sorted_.push_back(exp_sum(logits + i, std::min(kBlock, vocab - i), peak, inverse));
    total += sorted_.back();
  }
  double left = uniform() * total;
  size_t block = 0, last = 0;
  for (; block < sorted_.size(); ++block) {
    if (sorted_[block] > 0) last = block;
    if (left < sorted_[block]) break;
    left -= sorted_[block];
  }
  if (block == sorted_.size()) {  // rounding: the number fell behind the last of them
    block = last;
    left = sorted_[last];
  }
  int32_t chosen = 0;
  const size_t end = std::min(vocab, (block + 1) * kBlock);
  for (size_t i = block * kBlock; i < end; ++i) {
    const double weight = std::exp((static_cast<double>(logits[i]) - peak) / options_.temperature);
    if (weight > 0) chosen = static_cast<int32_t>(i);
    if (left < weight) break;
    left -= weight;
  }
  return chosen;
}

int32_t Sampler::pick(const float* logits, size_t vocab) {
  const float peak = *std::max_element(maxima_.begin(), maxima_.end());
  if (peak == kNothing) return -1;
  const size_t top_k = options_.top_k == 0 ? vocab : std::min(options_.top_k, vocab);
  if (options_.temperature == 0 || top_k == 1) {
    const auto block = std::find(maxima_.begin(), maxima_.end(), peak) - maxima_.begin();
    const float* first = logits + static_cast<size_t>(block) * kBlock;
    return static_cast<int32_t>(std::find(first, logits + vocab, peak) - logits);
  }
  const bool nucleus = options_.top_p < 1;
  if (top_k == vocab && !nucleus && options_.min_p == 0) return pick_any(logits, vocab, peak);

  // Without top-k the nucleus is a share of everything; guess how many tokens it takes and look further if
  // that was too few.
  double mass = 0;
  const bool open = top_k == vocab;
  if (open) {
    const float inverse = static_cast<float>(1.0 / options_.temperature);
    for (size_t i = 0; i < vocab; i += kLogitChunk)
      mass += decoder_kernels().exp_sum(logits + i, std::min(kLogitChunk, vocab - i), peak, inverse);
    mass *= options_.top_p;
  }
  size_t keep = 0;
  for (size_t wanted = open ? std::min<size_t>(256, vocab) : top_k;; wanted = std::min(vocab, wanted * 16)) {
    collect(logits, vocab, wanted);
    if (!open && pool_.size() > top_k) {
      std::nth_element(pool_.begin(), pool_.begin() + static_cast<ptrdiff_t>(top_k), pool_.end(), before);
      pool_.resize(top_k);
    }
    double held = 0;
    for (Candidate& c : pool_) {
      c.weight = std::exp((static_cast<double>(c.logit) - peak) / options_.temperature);
      held += c.weight;
    }
    const double smallest = (*std::max_element(pool_.begin(), pool_.end(), before)).weight;
    const bool complete = !open || wanted == vocab || held >= mass || smallest < options_.min_p;
    if (!complete) continue;
    keep = nucleus ? mass_prefix(open ? mass : options_.top_p * held) : pool_.size();
    break;
  }
  pool_.resize(std::max<size_t>(keep, 1));
  pool_.erase(std::remove_if(pool_.begin(), pool_.end(),
                             [this](const Candidate& c) { return c.weight < options_.min_p; }),
              pool_.end());
  std::sort(pool_.begin(), pool_.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  double total = 0;
  for (const Candidate& c : pool_) total += c.weight;
  double left = uniform() * total;
  for (const Candidate& c : pool_) {
    if (left < c.weight) return c.id;
    left -= c.weight;
  }
  return pool_.back().id;
}

const LikelyTokens& Sampler::likeliest(const float* logits, size_t vocab, const LogitStats& stats,
                                       size_t count) {
  find_maxima(logits, vocab);
  find_top(logits, vocab, stats, count);
  return top_;
}

int32_t Sampler::choose(float* logits, size_t vocab, const LogitStats& stats, const uint32_t* mask) {
  find_maxima(logits, vocab);
  find_top(logits, vocab, stats, options_.top_logprobs);
  changed_.clear();
  adjust(logits, vocab);
  if (mask) keep_allowed(logits, vocab, mask);
  if (mask || !changed_.empty()) find_maxima(logits, vocab);
  chosen_ = pick(logits, vocab);
  if (chosen_ < 0) return -1;
  float raw = logits[chosen_];
  for (auto change = changed_.rbegin(); change != changed_.rend(); ++change)
    if (change->first == chosen_) raw = change->second;
  logprob_ = static_cast<float>(raw - stats.log_sum);
  return chosen_;
}

}  // namespace lowbit
