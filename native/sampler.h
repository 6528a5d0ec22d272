// Choosing the next token from logits.
//
// Order: masks and forbidden tokens, bias, penalties, temperature, top-k, top-p, min-p. Each of the last
// three keeps a prefix of the tokens in descending order (ties: the lower id first), so no step sorts the
// vocabulary. Random numbers are a function of (seed, number of tokens chosen so far): the same tokens for
// every batch and thread count.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace lowbit {

struct SamplerOptions {
  double temperature = 0;  // 0: the largest logit
  size_t top_k = 0;        // 0: all tokens
  double top_p = 1;        // smallest set of likeliest tokens that holds this probability
  double min_p = 0;        // drop tokens below this share of the likeliest one's probability
  double repetition_penalty =
      1;                         // divides positive logits of tokens in the history, multiplies negative ones
  double presence_penalty = 0;   // subtracted from logits of tokens in the history
  double frequency_penalty = 0;  // subtracted once per occurrence
  uint64_t seed = 0;
  size_t top_logprobs = 0;                            // how many of the likeliest tokens to report
  std::vector<std::pair<int32_t, float>> logit_bias;  // (token, what is added to its logit)
  std::vector<int32_t> forbid;                        // never chosen ...
  uint64_t forbid_until = UINT64_MAX;                 // ... before so many tokens have been
};

// Tokens with their raw log-probabilities, likeliest first.
using LikelyTokens = std::vector<std::pair<int32_t, float>>;

// A mask allows token t if bit t % 32 of word t / 32 is set.
inline size_t mask_words(size_t vocab) { return (vocab + 31) / 32; }

// Peak and log of the sum of exponentials of a row of logits, found chunk by chunk in a fixed order.
struct LogitStats {
  float peak;
  double log_sum;  // log(sum(exp(x))); not finite if a logit is NaN or +inf, or all are -inf
};
constexpr size_t kLogitChunk = 4096;
inline size_t logit_chunks(size_t vocab) { return (vocab + kLogitChunk - 1) / kLogitChunk; }
// Largest value and sum of exponentials relative to it, of chunk `chunk` of a row.
struct LogitChunk {
  float peak, sum;
};
LogitChunk scan_chunk(const float* logits, size_t vocab, size_t chunk);
LogitStats join_chunks(const LogitChunk* chunks, size_t count);

class Sampler {
 public:
  // Throws std::invalid_argument on options out of range.
  explicit Sampler(const SamplerOptions& options);

  // Adds tokens to the history that penalties look at. Ids must not be negative.
  void observe(const int32_t* tokens, size_t count);
  // Takes memory for a vocabulary of this size, so that choose() allocates little. Throws
  // std::invalid_argument on a bias of a token beyond it.
  void reserve(size_t vocab);
  // The token for a row of logits whose statistics are `stats`, or -1 if none is left to choose; changes the
  // row. Fills logprob() and top(). Does not count as a step until commit(). `mask`: tokens that may be
  // chosen, or null. Precondition: stats.log_sum is finite.
  int32_t choose(float* logits, size_t vocab, const LogitStats& stats, const uint32_t* mask = nullptr);
  // Makes the chosen token part of the history and moves on to the next random number.
  void commit();
  // The `count` likeliest tokens of a row.
  const LikelyTokens& likeliest(const float* logits, size_t vocab, const LogitStats& stats, size_t count);

  // log-softmax of the raw logits (before penalties and temperature) at the last chosen token.
  float logprob() const { return logprob_; }
  // The likeliest tokens of the last step.
  const LikelyTokens& top() const { return top_; }

  bool acquire() { return !busy_.exchange(true); }
  void release() { busy_.store(false); }

 private:
  struct Candidate {
    float logit;
    int32_t id;
    double weight;
  };
  static bool before(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
  }
  bool penalizes() const;
  void change(float* logits, int32_t id, double value);
  void adjust(float* logits, size_t vocab);
  void find_maxima(const float* logits, size_t vocab);
  void find_top(const float* logits, size_t vocab, const LogitStats& stats, size_t count);
  void collect(const float* logits, size_t vocab, size_t wanted);
  int32_t pick(const float* logits, size_t vocab);
  int32_t pick_any(const float* logits, size_t vocab, float peak);
  size_t mass_prefix(double mass);
  double uniform() const;

  SamplerOptions options_;
  uint64_t steps_ = 0;
  std::unordered_map<int32_t, uint32_t> history_;   // token -> occurrences
  int32_t chosen_ = -1;                             // not yet committed
  std::vector<std::pair<int32_t, float>> changed_;  // logits before bias and penalties
  std::vector<float> maxima_;                       // largest logit of every 64
  std::vector<float> sorted_;
  std::vector<Candidate> pool_;
  LikelyTokens top_;
  float logprob_ = 0;
  std::atomic<bool> busy_{false};
};

}  // namespace lowbit
