// A decoder-only transformer: its description, its weights, and the calls that run it.
//
// One call takes tokens of several sequences (runs), each continuing its own KvCache, through all layers to
// logits, sampled tokens or scores. A result depends on the model, the tokens of its own sequence and their
// positions only: not on companions, on how a prompt is cut, on threads or on the instruction set.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "decoder_kernels.h"
#include "experts.h"
#include "kv_cache.h"
#include "matrix.h"
#include "sampler.h"
#include "step_profile.h"

namespace lowbit {

// What normalizes the stream; sub norms and those of queries and keys are always RMS.
enum class NormKind : uint8_t { rms, layer };
// What of a half of a layer is normalized: what it reads, what it adds to the stream, or both.
enum class NormPlace : uint8_t { pre, post, sandwich };

struct DecoderSpec {
  size_t n_layers = 0;
  size_t hidden_size = 0;
  size_t intermediate_size = 0;
  size_t n_heads = 0;
  size_t n_kv_heads = 0;
  size_t head_dim = 0;  // a multiple of 8
  size_t vocab_size = 0;
  float norm_eps = 1e-5f;
  Activation activation = Activation::silu;
  bool gated = true;  // MLP: activation(gate) * up; else activation(up)
  NormKind norm = NormKind::rms;
  NormPlace norm_place = NormPlace::pre;
  bool qk_norm = false;            // RMSNorm of every query and key head before rotation
  bool qk_norm_whole = false;      // with qk_norm: of all heads together
  bool sub_norm = false;           // RMSNorm before the o and down projections
  bool parallel = false;           // attention and MLP read the same stream
  bool learned_positions = false;  // row position + position_offset of `positions` is added to the embedding
  size_t position_offset = 0;
  float embedding_scale = 1;
  float attention_scale = 0;
  float attention_softcap = 0;  // scores become cap * tanh(score / cap); 0: they stay
  float logit_softcap = 0;
  bool sinks = false;       // a score per head that takes part in the softmax and has no value
  int activation_bits = 8;  // 8 or 16
  int kv_bits = 16;         // of keys and values: 16; 8 for attention in integers; 4 or 2 in pages
  size_t rotary_dim = 0;    // leading dimensions of a head that rotate; 0: none
  size_t n_experts = 0;
  size_t experts_per_token = 0;
  size_t expert_size = 0;  // intermediate size of an expert
  RouterOrder router_order = RouterOrder::softmax_topk;
  bool router_renormalize = false;
  std::vector<bool> sparse_layers;  // which layers have experts in place of an MLP; empty: none

  size_t q_size() const { return n_heads * head_dim; }
  size_t kv_size() const { return n_kv_heads * head_dim; }
  bool sparse(size_t layer) const { return !sparse_layers.empty() && sparse_layers[layer]; }
  Router router() const { return {n_experts, experts_per_token, router_order, router_renormalize}; }
  bool norms_input() const { return norm_place != NormPlace::post; }
  bool norms_output() const { return norm_place != NormPlace::pre; }
  KvShape kv_shape() const { return {n_layers, n_kv_heads, head_dim, kv_bits}; }
};

// Speeds of one rotation; cosines and sines are multiplied by `factor`.
struct Rotation {
  std::vector<float> inverse_frequencies;
  float factor = 1;
};

// One layer. Matrices belong to the caller; vectors are copies, empty where the network has none.
struct DecoderLayer {
  const Matrix *q = nullptr, *k = nullptr, *v = nullptr, *o = nullptr;
  const Matrix *gate = nullptr, *up = nullptr, *down = nullptr;
  std::vector<float> input_norm, post_norm, q_norm, k_norm, attn_sub_norm, ffn_sub_norm;
  std::vector<float> input_norm_bias, post_norm_bias, attn_out_norm, mlp_out_norm;
  std::vector<float> sinks;
  std::vector<float> q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias;
  ExpertLayer sparse;  // in place of gate, up and down, or without experts
  bool rotates = true;
  bool local = false;  // by the second rotation
  size_t window = 0;   // 0: all earlier positions
};

// `count` tokens that continue `cache`, and what a step is to find out about them.
struct Run {
  KvCache* cache;
  size_t count;
  Sampler* sampler = nullptr;  // chooses the token that follows; null: only append
  size_t drafts = 0;           // how many of the last tokens are guesses of what `sampler` will choose
  const uint32_t* masks =
      nullptr;      // [drafts + 1][mask_words(vocab_size)] tokens that may be chosen; null: all
  int scores = -1;  // likeliest tokens to report beside each score; -1: no scores
};

// What a step found out about a run.
struct StepRun {
  std::vector<int32_t> ids;              // chosen tokens: one, and one more for every guess that was right
  std::vector<float> logprobs;           // of each
  std::vector<LikelyTokens> tops;        // for each, as the sampler's top_logprobs asks
  std::vector<float> scores;             // [count - 1] log p(next token of the run | tokens up to here)
  std::vector<LikelyTokens> score_tops;  // [count - 1]
  bool failed =
      false;  // no token can be chosen or scored; cache and sampler are as before, all else is empty
};

class DecoderWorkspace;

class Decoder {
 public:
  // Throws std::invalid_argument on a description that cannot run.
  explicit Decoder(const DecoderSpec& spec);
  ~Decoder();

  // Names: "embed", "head", "positions", "layers.N.q|k|v|o|gate|up|down", in sparse layers "layers.N.router"
  // and "layers.N.experts.J.gate|up|down". The matrix must outlive the decoder.
  void set_matrix(const std::string& name, const Matrix* matrix);
  // Names: "norm", "norm_bias", and "layers.N." before input_norm|input_norm_bias|attn_out_norm|post_norm|
  // post_norm_bias|mlp_out_norm|q_norm|k_norm|attn_sub_norm|ffn_sub_norm|sinks|q_bias|k_bias|v_bias|o_bias|
  // gate_bias|up_bias|down_bias. post_norm is that before the MLP. Copied.
  void set_vector(const std::string& name, const float* values, size_t count);
  // Rotation by position * inverse_frequencies[i], cosines and sines times `attention_factor`, in the layers
  // where `layers` is true (size n_layers).
  void set_rope(const float* inverse_frequencies, size_t count, float attention_factor,
                const std::vector<bool>& layers);
  // Another rotation for the layers where `layers` is true, of those that rotate.
  void set_local_rope(const float* inverse_frequencies, size_t count, float attention_factor,
                      const std::vector<bool>& layers);
  void set_windows(const std::vector<int64_t>& windows);
  // Checks that everything needed is there. Throws std::invalid_argument naming what is missing.
  void finish();

  const DecoderSpec& spec() const { return spec_; }
  const Matrix& embedding() const { return *embed_; }
  const Matrix& head() const { return *head_; }
  const Matrix* positions() const { return positions_; }
  const std::vector<float>& final_norm() const { return norm_; }
  const std::vector<float>& final_norm_bias() const { return norm_bias_; }
  const DecoderLayer& layer(size_t i) const { return layers_[i]; }
  // That of most layers, then the local one where there is one.
  const std::vector<Rotation>& rotations() const { return rotations_; }
  // A decoder without weights still has a shape; only a finished one runs.
  bool finished() const { return finished_; }

  // Both append runs[i].count of `tokens` to runs[i].cache. Calls from several threads queue up. They throw
  // std::invalid_argument on bad arguments, and then nothing has changed.
  //
  // out[run][vocab_size] for the last token of each run, or out[token][vocab_size] for all.
  void logits(const std::vector<int32_t>& tokens, const std::vector<Run>& runs, bool all, float* out);
  // Samples after the last token of each run with a sampler. Where the last k tokens are guesses, it samples
  // before each of them and after the last, as long as the guesses are what it chooses; the cache then ends
  // before the first wrong one. Tokens, log-probabilities and the sampler's state are those of k + 1 steps
  // of one token. A run whose logits are not finite, or whose mask leaves nothing to choose, fails alone; if
  // that happens behind a guess, the run ends there and the next step fails.
  std::vector<StepRun> step(const std::vector<int32_t>& tokens, const std::vector<Run>& runs);

  // Measures the steps between the two calls, phase by phase.
  void start_profile();
  StepProfile stop_profile();

 private:
  friend class DecoderWorkspace;
  size_t layer_number(const std::string& name, std::string* rest) const;
  void need_open(const std::string& name) const;
  void check_experts(size_t index) const;
  Rotation rotation(const char* call, const float* inverse_frequencies, size_t count, float attention_factor,
                    const std::vector<bool>& layers) const;
  void check_step(const char* call, const std::vector<int32_t>& tokens, const std::vector<Run>& runs) const;

  DecoderSpec spec_;
  const Matrix* embed_ = nullptr;
  const Matrix* head_ = nullptr;
  const Matrix* positions_ = nullptr;
  std::vector<float> norm_, norm_bias_;
  std::vector<DecoderLayer> layers_;
  std::vector<Rotation> rotations_{1};
  bool finished_ = false;
  std::mutex step_;  // one step at a time: the workspace is shared
  std::unique_ptr<DecoderWorkspace> workspace_;
};

}  // namespace lowbit
