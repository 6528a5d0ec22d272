// One step of the decoder from inside: its memory, its passes, and the way of one thread through a pass.
//
// A step is cut into passes of at most 512 tokens, so that memory stays small; results are the same. A pass
// is one run of the team: all members walk the same layers and meet at barriers.
//
//   few tokens   every member keeps its own residual stream and repeats the cheap work on rows (norms,
//   rounding,
//                activations): 5 barriers per layer
//   many tokens  members share the rows out: 9 or 10 barriers per layer, small beside the products
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "decoder.h"
#include "matmul.h"
#include "step_profile.h"
#include "team.h"

namespace lowbit {

// Floats on a cache line; grows, never shrinks, starts with no defined contents.
class FloatBuffer {
 public:
  float* grow(size_t count) {
    if (count > capacity_) {
      memory_.reset(new float[count + 16]);
      capacity_ = count;
      first_ = reinterpret_cast<float*>(round_up(reinterpret_cast<uintptr_t>(memory_.get()), 64));
    }
    return first_;
  }
  float* get() const { return first_; }

 private:
  std::unique_ptr<float[]> memory_;
  float* first_ = nullptr;
  size_t capacity_ = 0;
};

// Rows that either every member has for itself (few tokens) or all share (many).
struct Lane {
  FloatBuffer stream;     // [tokens][hidden] residual
  FloatBuffer normed;     // [tokens][max(hidden, q_size)] where a product reads floats, else a row per member
  FloatBuffer activated;  // [tokens][intermediate] where `down` reads floats, else one row per member
  FloatBuffer rotation;   // [tokens][rotations][rotary_dim]: cosines, then sines
  ActivationBuffer hidden_memory, attention_memory, inner_memory, head_memory;
  Activations hidden, attention, inner, head;
  // Of a sparse layer.
  std::vector<uint32_t> chosen;  // [tokens][experts_per_token]
  FloatBuffer shares;            // the same: weights of the chosen
  FloatBuffer mixed;        // few tokens: [tokens][hidden_stride], the weighted sum of what experts return
  FloatBuffer expert_rows;  // [pairs][expert_size] where some `down` reads floats, else one row per member
  ActivationBuffer expert_memory;
  Activations expert_inner;  // [pairs]
};

// Rows of the experts of a wave, pairs of a token and an expert: see decoder_experts.cc.
struct ExpertMemory {
  size_t router_stride = 0, inner_stride = 0;  // floats from one row to the next
  bool reads_values = false;                   // some `gate` or `up` of an expert reads floats
  bool inner_floats = false;                   // some `down` does
  size_t rows = 0;                             // pairs of a wave, at most
  FloatBuffer scores;                          // [tokens][router_stride]
  FloatBuffer gate, up, down, values;          // [pairs]
  ActivationBuffer gathered_memory;
  Activations gathered;                    // [pairs], many tokens only
  std::vector<ExpertPlan> plans;           // per member, all alike
  std::vector<std::vector<Job>> jobs;      // per member
  std::vector<std::vector<float>> copies;  // per member
  void lay_out(const DecoderSpec& spec, size_t tokens, size_t hidden_stride, size_t members, bool redundant,
               size_t most, std::vector<std::unique_ptr<Lane>>& lanes);
};

// Tokens of one sequence within a pass.
struct Slice {
  KvCache* cache;
  size_t position;  // of the first token
  size_t count;
  size_t row;      // of the first token in the pass
  size_t passing;  // 4 and 2 bits: which of the workspace's pages has the one that `position` is in
};

// A page of 4 or 2 bits that a pass completes.
struct CompletePage {
  size_t slice;
  size_t page;
};

// Queries of one key-value head, over segments [first_segment, last_segment].
struct AttentionItem {
  size_t slice;
  size_t first_query;  // within the slice
  size_t queries;
  size_t kv_head;
  size_t first_segment, last_segment;
  size_t tile;      // counter of the split tile this belongs to
  size_t segments;  // segments of the whole tile; more than this item's own if the tile is split
  size_t partial;   // where the split tile's states lie, in floats
  size_t cost;      // keys to visit
};

// Where a step leaves what it finds: either logits or results.
struct StepOutput {
  float* logits = nullptr;  // [runs][vocab], or [tokens][vocab] if `all`
  bool all = false;
  StepRun* results = nullptr;  // [runs]
};

// Wanted rows that one member turns into results in order: those at which a run samples, or one to score.
struct RowTask {
  size_t run;
  size_t first, count;  // among the wanted rows
};

class DecoderWorkspace {
 public:
  explicit DecoderWorkspace(const Decoder& decoder);
  // Runs the step and leaves the caches' lengths and the last token of each sampler to the caller.
  void run(const std::vector<int32_t>& tokens, const std::vector<Run>& runs, const StepOutput& output);
  StepProfile profile;

 private:
  friend class Walk;
  void plan_pass(size_t begin, size_t end, size_t members);
  void plan_pages();
  void plan_attention(size_t members);
  void lay_out(size_t members);
  size_t expert_floats();
  size_t rotation_stride() const { return decoder_.rotations().size() * spec_.rotary_dim; }
  size_t normed_size() const { return std::max(spec_.hidden_size, spec_.q_size()); }

  const Decoder& decoder_;
  const DecoderSpec& spec_;
  size_t pass_tokens_;  // at most this many tokens in a pass
  size_t queries_per_tile_;

  // The step at hand.
  const std::vector<int32_t>* tokens_ = nullptr;
  const std::vector<Run>* runs_ = nullptr;
  std::vector<size_t> ends_;  // of each run, among all tokens
  StepOutput output_{};

  // The pass at hand.
  size_t first_token_ = 0, count_ = 0;
  bool redundant_ = false;     // every member has its own lane
  bool fused_append_ = false;  // one token per sequence: the attention item stores its key and value
  std::vector<Slice> slices_;
  std::vector<CompletePage> complete_pages_;
  FloatBuffer passing_pages_;   // 16-bit pages of one layer, of which the caches hold but the last
  std::vector<size_t> wanted_;  // rows whose logits are wanted, ascending
  size_t first_output_ = 0;     // where the logits of wanted_[0] go; the others follow
  std::vector<RowTask> tasks_;
  std::vector<AttentionItem> items_;
  std::unique_ptr<std::atomic<size_t>[]> next_item_;   // [layers]
  std::unique_ptr<std::atomic<size_t>[]> open_parts_;  // [split tiles], segments not yet done
  size_t open_parts_capacity_ = 0;

  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<MatmulScratch> matmul_scratch_;   // per member
  std::vector<FloatBuffer> attention_scratch_;  // per member
  FloatBuffer halves_, gate_, projected_, partials_, logits_;
  // Floats from one token to the next where products write: see row_stride().
  size_t qkv_stride_, hidden_stride_, inner_stride_;
  bool inner_floats_ = false;   // some `down` reads its input as floats
  bool normed_floats_ = false;  // some other product does
  // Within `halves_`: the attention half of a layer has queries, keys and values, then attended rows; the
  // other half puts `up` in their place, and at its end, when that is activated, what `down` projects. The
  // projection of `o` lies in `gate_`. A barrier stands between the last read of one and the first write of
  // the other. Where members have lanes of their own, both projections lie in `projected_`.
  float* qkv_ = nullptr;
  float* attended_ = nullptr;
  float* up_ = nullptr;
  float* from_attention_ = nullptr;  // [tokens][hidden], what a half adds to the stream
  float* from_mlp_ = nullptr;
  std::vector<LogitChunk> chunks_;
  ExpertMemory experts_;
  std::vector<std::unique_ptr<Sampler>> scorers_;  // per member: finds the likeliest tokens beside scores
};

// What comes into the stream before a half of a layer, and how the half reads it.
struct Entry {
  const float* delta;              // row of what the half before projected; null: nothing
  const std::vector<float>& bias;  // of that projection
  const std::vector<float>& delta_norm;
  const std::vector<float>& norm;  // empty: the stream is read as it is
  const std::vector<float>& norm_bias;
  bool late = false;  // the stream is read before `delta` comes in
};

// One member's way through a pass.
class Walk {
 public:
  Walk(DecoderWorkspace& workspace, const Member& member);
  void run();

 private:
  void own_rows(size_t rows, size_t* begin, size_t* end) const;
  void barrier() const { member_.barrier(); }
  // After work on rows: others need it only where rows are shared.
  void sync() const {
    if (!w_.redundant_) member_.barrier();
  }
  void product(const Product* products, size_t count, const Activations& a);
  void embed();
  void enter(const Entry& entry);
  float* normed_row(size_t row, size_t size) const;
  void enter_row(size_t row, const Entry& entry, float* out, const IntegerRow& integers);
  void norm(float* x, const float* y, const float* bias, const std::vector<float>& weight, const float* shift,
            float* out, const IntegerRow* integers);
  void attention_half(size_t layer);
  void norm_heads(const DecoderLayer& layer);
  void mlp_half(const DecoderLayer& layer);
  void dense_mlp(const DecoderLayer& layer);
  // decoder_experts.cc
  void expert_half(const ExpertLayer& layer);
  void expert_wave(const ExpertLayer& layer, const ExpertPlan& plan, size_t first, size_t last);
  // Where the experts' sum goes, and what the MLP of `layer` has left: [tokens][hidden_stride].
  float* expert_sum() const { return w_.redundant_ ? lane_.mixed.get() : w_.from_mlp_; }
  const float* from_mlp(size_t layer) const {
    return decoder_.layer(layer).sparse.experts.empty() ? w_.from_mlp_ : expert_sum();
  }
  // decoder_pages.cc
  uint16_t* page_at(const Slice& slice, size_t page, size_t layer, size_t kv_head) const;
  void seal(size_t layer, const Slice& slice, size_t page, size_t kv_head);
  void seal_all(size_t layer);
  // decoder_attention.cc
  void append_all(size_t layer);
  void append(size_t layer, const Slice& slice, size_t query, size_t kv_head);
  void attend(size_t layer);
  void attend_item(size_t layer, const AttentionItem& item);
  HeadPreparation preparation(size_t layer, size_t row) const;
  // decoder_head.cc
  void keep_wanted();
  void head();
  void head_group(size_t first, size_t count);
  bool sample_row(size_t run, size_t token, float* logits, const LogitStats& stats);
  void score_row(size_t run, size_t token, const float* logits, const LogitStats& stats);

  DecoderWorkspace& w_;
  const Decoder& decoder_;
  const DecoderSpec& spec_;
  const DecoderKernels& kernels_;
  const Member& member_;
  Lane& lane_;
  size_t rows_;            // tokens of the pass, fewer once only wanted rows are left
  bool narrowed_ = false;  // row i is wanted row i
  PhaseClock clock_;
};

constexpr size_t kHeadRows = 64;  // rows whose logits are held at a time
// The head reads 16-bit activations whatever the layers do: a third of the error of int8 activations came
// from here, and with one token the product waits for memory either way.
constexpr int kHeadLimbs = 2;

}  // namespace lowbit
