// Steps, passes and their memory. See decoder_step.h.
#include "decoder_step.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace lowbit {
namespace {

constexpr size_t kFewTokens = 2;      // up to here members repeat work on rows instead of sharing it
constexpr size_t kPassStep = 96;      // tokens: full column tiles of the products and full tiles of queries
constexpr size_t kLargestPass = 480;  // products gain nothing from more
constexpr size_t kPassSlack = 24;     // that passes may share beyond their size: decoding beside a full chunk
constexpr size_t kColumns = 6;        // tokens that a register tile of the products takes
// Beyond a step, rows of a pass take at most 1/32 of the weights' memory, and 1/16 of what exceeds 128 MB.
constexpr size_t kPassShare = 32, kLargeWeights = size_t{128} << 20;
// Rows of an attention tile: a multiple of six (the register tile) and of the usual group sizes 1-4, 6, 8, 9;
// keys and values are widened once for all of them.
constexpr size_t kTileQueries = 72;

// Products write 32 floats of each token in turn. A stride of an odd number of such pieces spreads the pieces
// of 32 consecutive tokens over all sets of the cache; multiples of 4 KB would put them all in one.
size_t row_stride(size_t n) { return ((n + kBlockRows - 1) / kBlockRows | 1) * kBlockRows; }

size_t weight_bytes(const Decoder& decoder) {
  size_t bytes = decoder.head().bytes();
  for (size_t i = 0; i < decoder.spec().n_layers; ++i) {
    const DecoderLayer& l = decoder.layer(i);
    for (const Matrix* m : {l.q, l.k, l.v, l.o, l.gate, l.up, l.down}) bytes += m ? m->bytes() : 0;
    for (const Expert& e : l.sparse.experts)
      for (const Matrix* m : {e.gate, e.up, e.down}) bytes += m->bytes();
  }
  return bytes;
}

// Gives the caches and samplers back however the step ends.
template <typename T>
class Claims {
 public:
  ~Claims() {
    for (T* item : items_) item->release();
  }
  void claim(T* item, const char* call, const char* what, size_t index) {
    if (!item->acquire())
      throw std::invalid_argument(
          std::string(call) + ": " + what + " " + std::to_string(index) +
          " appears twice in this step or another thread is using it; give each sequence "
          "its own and join runs of one sequence");
    items_.push_back(item);
  }

 private:
  std::vector<T*> items_;
};

}  // namespace

// ---- The calls of decoder.h

void Decoder::check_step(const char* call, const std::vector<int32_t>& tokens,
                         const std::vector<Run>& runs) const {
  const std::string name = call;
  if (!finished_) throw std::invalid_argument(name + ": the decoder is not finished; call finish() first");
  if (runs.empty()) throw std::invalid_argument(name + ": no caches given; give at least one run");
  size_t total = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (runs[i].count == 0)
      throw std::invalid_argument(name + ": counts[" + std::to_string(i) + "]=0; every run needs a token");
    total += runs[i].count;
  }
  if (total != tokens.size())
    throw std::invalid_argument(name + ": counts sum to " + std::to_string(total) + ", but there are " +
                                std::to_string(tokens.size()) + " tokens");
  for (size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] < 0 || static_cast<size_t>(tokens[i]) >= spec_.vocab_size)
      throw std::invalid_argument(
          name + ": tokens[" + std::to_string(i) + "]=" + std::to_string(tokens[i]) +
          " is outside 0 to vocab_size - 1 = " + std::to_string(spec_.vocab_size - 1));
  for (size_t i = 0; i < runs.size(); ++i) {
    const KvCache& cache = *runs[i].cache;
    if (!(cache.shape() == spec_.kv_shape()))
      throw std::invalid_argument(name + ": cache " + std::to_string(i) + " was made for another decoder");
    if (runs[i].count > cache.capacity() - cache.length())
      throw std::invalid_argument(
          name + ": cache " + std::to_string(i) + " holds " + std::to_string(cache.length()) +
          " of capacity=" + std::to_string(cache.capacity()) + " positions and cannot take " +
          std::to_string(runs[i].count) + " more; truncate it or make a larger one");
    const size_t rows = positions_ ? positions_->out_features - spec_.position_offset : SIZE_MAX;
    if (cache.length() + runs[i].count > rows)
      throw std::invalid_argument(name + ": cache " + std::to_string(i) + " would hold " +
                                  std::to_string(cache.length() + runs[i].count) +
                                  " positions, and the network has " + std::to_string(rows) +
                                  "; shorten the text");
    if (!runs[i].cache->prepare(cache.length() + runs[i].count))
      throw std::invalid_argument(name + ": cache " + std::to_string(i) + " has no blocks for " +
                                  std::to_string(runs[i].count) + " more positions after " +
                                  std::to_string(cache.length()) + "; call its reserve() first");
  }
}

void Decoder::logits(const std::vector<int32_t>& tokens, const std::vector<Run>& runs, bool all, float* out) {
  const std::lock_guard<std::mutex> lock(step_);
  Claims<KvCache> caches;
  for (size_t i = 0; i < runs.size(); ++i) caches.claim(runs[i].cache, "Decoder.logits", "cache", i);
  check_step("Decoder.logits", tokens, runs);
  StepOutput output;
  output.logits = out;
  output.all = all;
  workspace_->run(tokens, runs, output);
  for (const Run& run : runs) run.cache->set_length(run.cache->length() + run.count);
}

static void check_run(const Run& run, size_t index) {
  const std::string name = "[" + std::to_string(index) + "]";
  if (run.drafts >= run.count)
    throw std::invalid_argument("Decoder.step: drafts" + name + "=" + std::to_string(run.drafts) +
                                " must be less than counts" + name + "=" + std::to_string(run.count) +
                                "; the first guess follows a token that is no guess");
  if (run.drafts > 0 && !run.sampler)
    throw std::invalid_argument("Decoder.step: run " + std::to_string(index) +
                                " has drafts but no sampler; give the sampler that judges them");
  if (run.masks && !run.sampler)
    throw std::invalid_argument("Decoder.step: run " + std::to_string(index) +
                                " has a mask but no sampler; give the sampler that obeys it");
  if (run.scores < -1 || run.scores > 10000)
    throw std::invalid_argument("Decoder.step: scores" + name + "=" + std::to_string(run.scores) +
                                " must be -1 (none) to 10000 likeliest tokens");
  if (run.drafts > 0 && run.scores >= 0)
    throw std::invalid_argument("Decoder.step: run " + std::to_string(index) +
                                " has drafts and scores; score the prompt in a step of its own");
}

void Decoder::start_profile() {
  const std::lock_guard<std::mutex> lock(step_);
  if (!finished_)
    throw std::invalid_argument("Decoder.start_profile: the decoder is not finished; call finish() first");
  workspace_->profile = StepProfile();
  workspace_->profile.on = true;
}

StepProfile Decoder::stop_profile() {
  const std::lock_guard<std::mutex> lock(step_);
  if (!finished_) return StepProfile();
  workspace_->profile.on = false;
  return workspace_->profile;
}

std::vector<StepRun> Decoder::step(const std::vector<int32_t>& tokens, const std::vector<Run>& runs) {
  const std::lock_guard<std::mutex> lock(step_);
  Claims<KvCache> caches;
  Claims<Sampler> samplers;
  for (size_t i = 0; i < runs.size(); ++i) {
    caches.claim(runs[i].cache, "Decoder.step", "cache", i);
    if (runs[i].sampler) samplers.claim(runs[i].sampler, "Decoder.step", "sampler", i);
  }
  check_step("Decoder.step", tokens, runs);
  std::vector<StepRun> results(runs.size());
  for (size_t i = 0; i < runs.size(); ++i) {
    check_run(runs[i], i);
    if (spec_.kv_shape().paged() && runs[i].drafts > kKvPage)
      throw std::invalid_argument("Decoder.step: drafts[" + std::to_string(i) +
                                  "]=" + std::to_string(runs[i].drafts) + " must be at most " +
                                  std::to_string(kKvPage) + " with " + std::to_string(spec_.kv_bits) +
                                  "-bit keys and values; guess fewer");
    if (runs[i].sampler) runs[i].sampler->reserve(spec_.vocab_size);
    if (runs[i].scores >= 0) results[i].scores.resize(runs[i].count - 1);
    if (runs[i].scores > 0) results[i].score_tops.resize(runs[i].count - 1);
  }
  StepOutput output;
  output.results = results.data();
  workspace_->run(tokens, runs, output);
  for (size_t i = 0; i < runs.size(); ++i) {
    const Run& run = runs[i];
    const std::vector<float>& scores = results[i].scores;
    if ((run.sampler && results[i].ids.empty()) ||
        std::any_of(scores.begin(), scores.end(), [](float score) { return std::isnan(score); })) {
      results[i] = StepRun();
      results[i].failed = true;
      continue;
    }
    size_t kept = run.count;
    if (run.sampler) {
      run.sampler->commit();
      kept = run.count - run.drafts + results[i].ids.size() - 1;  // all chosen tokens but the last
    }
    run.cache->set_length(run.cache->length() + kept);
  }
  return results;
}

// ---- Passes

DecoderWorkspace::DecoderWorkspace(const Decoder& decoder) : decoder_(decoder), spec_(decoder.spec()) {
  const size_t limbs = static_cast<size_t>(spec_.activation_bits) / 8;
  qkv_stride_ = row_stride(spec_.q_size() + 2 * spec_.kv_size());
  hidden_stride_ = row_stride(spec_.hidden_size);
  inner_stride_ = row_stride(spec_.intermediate_size);
  normed_floats_ = decoder.head().reads_values();
  for (size_t i = 0; i < spec_.n_layers; ++i) {
    const DecoderLayer& l = decoder.layer(i);
    inner_floats_ |= l.down && l.down->reads_values();
    for (const Matrix* m : {l.q, l.k, l.v, l.o, l.gate, l.up, l.sparse.router})
      normed_floats_ |= m && m->reads_values();
    for (const Expert& e : l.sparse.experts) {
      experts_.reads_values |= e.gate->reads_values() || e.up->reads_values();
      experts_.inner_floats |= e.down->reads_values();
    }
  }
  normed_floats_ |= experts_.reads_values;
  const size_t halves = std::max(qkv_stride_ + spec_.q_size(), inner_stride_);
  const size_t floats = spec_.hidden_size + halves + std::max(inner_stride_, hidden_stride_) +
                        rotation_stride() + (inner_floats_ ? spec_.intermediate_size : 0) +
                        (normed_floats_ ? normed_size() : 0) + expert_floats();
  const size_t codes = spec_.hidden_size + spec_.q_size() + spec_.intermediate_size;
  const size_t weights = weight_bytes(decoder);
  const size_t allowed = (weights + std::max(weights, kLargeWeights) - kLargeWeights) / kPassShare;
  const size_t fitting = allowed / (floats * sizeof(float) + 2 * codes * limbs);
  pass_tokens_ = std::clamp(fitting / kPassStep * kPassStep, kPassStep, kLargestPass);
  queries_per_tile_ = std::max<size_t>(1, kTileQueries / (spec_.n_heads / spec_.n_kv_heads));
  next_item_.reset(new std::atomic<size_t>[spec_.n_layers]);
}

// What a pass takes for each token where there are experts: a wave has as many rows as a pass has tokens.
size_t DecoderWorkspace::expert_floats() {
  if (!spec_.n_experts) return 0;
  experts_.router_stride = row_stride(spec_.n_experts);
  experts_.inner_stride = row_stride(spec_.expert_size);
  return experts_.router_stride + 3 * experts_.inner_stride + hidden_stride_ +
         (experts_.reads_values ? spec_.hidden_size : 0);
}

void DecoderWorkspace::run(const std::vector<int32_t>& tokens, const std::vector<Run>& runs,
                           const StepOutput& output) {
  const auto started = std::chrono::steady_clock::now();
  const std::shared_ptr<Team> crew = team();
  tokens_ = &tokens;
  runs_ = &runs;
  output_ = output;
  first_output_ = 0;
  ends_.clear();
  for (const Run& run : runs) ends_.push_back((ends_.empty() ? 0 : ends_.back()) + run.count);
  // Passes of equal size: a short one at the end would unpack all weights for a few tokens.
  const size_t counted = tokens.size() - std::min(kPassSlack, tokens.size() - 1);
  const size_t passes = (counted + pass_tokens_ - 1) / pass_tokens_;
  const size_t size = round_up((tokens.size() + passes - 1) / passes, kColumns);
  for (size_t begin = 0; begin < tokens.size(); begin += size) {
    plan_pass(begin, std::min(tokens.size(), begin + size), crew->size());
    crew->run([this](const Member& member) { Walk(*this, member).run(); });
    first_output_ += wanted_.size();
  }
  if (profile.on) {
    ++profile.steps;
    profile.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  }
}

// Tokens [begin, end) of the step become a pass.
void DecoderWorkspace::plan_pass(size_t begin, size_t end, size_t members) {
  first_token_ = begin;
  count_ = end - begin;
  redundant_ = count_ <= kFewTokens;
  slices_.clear();
  wanted_.clear();
  tasks_.clear();
  for (size_t index = 0; index < runs_->size(); ++index) {
    const Run& run = (*runs_)[index];
    const size_t run_end = ends_[index], first = run_end - run.count, sampled = run_end - 1 - run.drafts;
    const size_t from = std::max(first, begin), to = std::min(run_end, end);
    if (from >= to) continue;
    const size_t position = run.cache->length() + (from - first);
    slices_.push_back({run.cache, position, to - from, from - begin, 0});
    if (spec_.kv_shape().paged())
      run.cache->hold_pages(position, position + to - from, run.cache->length() + run.count - run.drafts);
    for (size_t i = from; i < to; ++i) {
      const bool wanted = output_.logits ? output_.all || i + 1 == run_end
                          : i < sampled  ? run.scores >= 0
                                         : run.sampler != nullptr;
      if (!wanted) continue;
      if (i <= sampled || i == from) tasks_.push_back({index, wanted_.size(), 0});
      ++tasks_.back().count;
      wanted_.push_back(i - begin);
    }
  }
  fused_append_ = std::all_of(slices_.begin(), slices_.end(), [](const Slice& s) { return s.count == 1; });
  plan_pages();
  plan_attention(members);
  lay_out(members);
}

// Cuts attention into items: tiles of queries per key-value head. Where there are too few to keep the members
// busy, each segment of a tile becomes an item of its own; whoever finishes a tile's last one merges them in
// order, so the result is the same.
void DecoderWorkspace::plan_attention(size_t members) {
  items_.clear();
  size_t tiles = 0;
  for (const Slice& s : slices_)
    tiles += (s.count + queries_per_tile_ - 1) / queries_per_tile_ * spec_.n_kv_heads;
  const bool split = members > 1 && tiles < 4 * members;
  const size_t group = spec_.n_heads / spec_.n_kv_heads;
  const size_t stride = spec_.kv_shape().value_stride();
  const bool paged = spec_.kv_shape().paged();  // queries of a tile see the same pages as codes
  size_t split_tiles = 0, partial = 0;
  for (size_t i = 0; i < slices_.size(); ++i) {
    for (size_t query = 0, queries; query < slices_[i].count; query += queries) {
      queries = std::min(queries_per_tile_, slices_[i].count - query);
      if (paged) queries = std::min(queries, kKvPage - (slices_[i].position + query) % kKvPage);
      const size_t last = slices_[i].position + query + queries - 1;
      const size_t segments = last / kSegment + 1;
      for (size_t head = 0; head < spec_.n_kv_heads; ++head) {
        if (!split || segments == 1) {
          items_.push_back({i, query, queries, head, 0, segments - 1, 0, segments, 0, last * queries});
          continue;
        }
        for (size_t s = 0; s < segments; ++s)
          items_.push_back(
              {i, query, queries, head, s, s, split_tiles, segments, partial, kSegment * queries});
        partial += segments * queries * group * (stride + 2);
        ++split_tiles;
      }
    }
  }
  std::stable_sort(items_.begin(), items_.end(),
                   [](const AttentionItem& a, const AttentionItem& b) { return a.cost > b.cost; });
  partials_.grow(partial);
  if (split_tiles > open_parts_capacity_) {
    open_parts_.reset(new std::atomic<size_t>[split_tiles]);
    open_parts_capacity_ = split_tiles;
  }
  for (const AttentionItem& item : items_)
    if (item.segments > item.last_segment - item.first_segment + 1) open_parts_[item.tile] = item.segments;
  for (size_t layer = 0; layer < spec_.n_layers; ++layer) next_item_[layer] = 0;
}

// Takes all memory of the pass, so that the members never allocate rows.
void DecoderWorkspace::lay_out(size_t members) {
  const size_t n = count_, q = spec_.q_size();
  const int limbs = spec_.activation_bits / 8;
  qkv_ = up_ = from_mlp_ = halves_.grow(n * std::max({qkv_stride_ + q, inner_stride_, hidden_stride_}));
  attended_ = qkv_ + n * qkv_stride_;
  from_attention_ = gate_.grow(n * std::max(inner_stride_, hidden_stride_));
  // With a lane per member nobody waits between reading a projection and the next product.
  if (redundant_) from_attention_ = from_mlp_ = projected_.grow(n * hidden_stride_);
  if (!output_.logits) {
    const size_t held = std::min(wanted_.size(), kHeadRows);
    logits_.grow(held * spec_.vocab_size);
    chunks_.resize(held * logit_chunks(spec_.vocab_size));
  }
  const size_t lanes = redundant_ ? members : 1;
  while (lanes_.size() < lanes) lanes_.push_back(std::make_unique<Lane>());
  for (size_t i = 0; i < lanes; ++i) {
    Lane& lane = *lanes_[i];
    lane.stream.grow(n * spec_.hidden_size);
    lane.rotation.grow(n * rotation_stride());
    float* normed = lane.normed.grow((normed_floats_ ? n : members) * normed_size());
    float* inner = lane.activated.grow((inner_floats_ ? n : members) * spec_.intermediate_size);
    lane.hidden = lane.hidden_memory.prepare(n, spec_.hidden_size, limbs, normed);
    lane.head = lane.head_memory.prepare(std::min(n, kHeadRows), spec_.hidden_size, kHeadLimbs, normed);
    lane.attention = lane.attention_memory.prepare(n, q, limbs, spec_.sub_norm ? normed : attended_);
    lane.inner = lane.inner_memory.prepare(n, spec_.intermediate_size, limbs, inner);
  }
  if (spec_.n_experts) experts_.lay_out(spec_, n, hidden_stride_, members, redundant_, pass_tokens_, lanes_);
  if (matmul_scratch_.size() < members) matmul_scratch_.resize(members);
  if (attention_scratch_.size() < members) attention_scratch_.resize(members);
  while (scorers_.size() < members) scorers_.push_back(std::make_unique<Sampler>(SamplerOptions()));
  const size_t stride = spec_.kv_shape().value_stride();
  const size_t tile_rows = queries_per_tile_ * (spec_.n_heads / spec_.n_kv_heads);
  for (FloatBuffer& scratch : attention_scratch_)
    scratch.grow(tile_rows * (3 * stride + 4) + 64 + kAttentionBlock * (spec_.head_dim + stride) + stride);
}

}  // namespace lowbit
