// The description of a decoder and its weights: names, shapes, completeness. See decoder.h.
#include "decoder.h"

#include <cmath>
#include <stdexcept>

#include "decoder_step.h"

namespace lowbit {
namespace {

[[noreturn]] void refuse(const std::string& text) { throw std::invalid_argument(text); }

std::string text(size_t n) { return std::to_string(n); }

void require_range(const char* name, size_t value, size_t low, size_t high) {
  if (value < low || value > high)
    refuse(std::string("Decoder: ") + name + "=" + text(value) + " must be " + text(low) + " to " +
           text(high));
}

// Names of a layer's weights and where they lie; sizes follow from the description.
struct MatrixField {
  const char* name;
  const Matrix* DecoderLayer::* field;
  size_t (*out)(const DecoderSpec&);
  size_t (*in)(const DecoderSpec&);
};
size_t hidden(const DecoderSpec& s) { return s.hidden_size; }
size_t inner(const DecoderSpec& s) { return s.intermediate_size; }
size_t queries(const DecoderSpec& s) { return s.q_size(); }
size_t keys(const DecoderSpec& s) { return s.kv_size(); }
size_t heads(const DecoderSpec& s) { return s.n_heads; }
size_t query_norm(const DecoderSpec& s) { return s.qk_norm_whole ? s.q_size() : s.head_dim; }
size_t key_norm(const DecoderSpec& s) { return s.qk_norm_whole ? s.kv_size() : s.head_dim; }
constexpr MatrixField kMatrices[] = {
    {"q", &DecoderLayer::q, queries, hidden},     {"k", &DecoderLayer::k, keys, hidden},
    {"v", &DecoderLayer::v, keys, hidden},        {"o", &DecoderLayer::o, hidden, queries},
    {"gate", &DecoderLayer::gate, inner, hidden}, {"up", &DecoderLayer::up, inner, hidden},
    {"down", &DecoderLayer::down, hidden, inner},
};

bool of_mlp(const MatrixField& f) { return f.out == inner || f.in == inner; }

// Vectors that the description asks for; those without a word in it may be there or not.
struct Wanted {
  const char* field;  // of the description, for error messages; null: optional
  bool (*present)(const DecoderSpec&);
};
constexpr Wanted kOptional = {nullptr, nullptr};
constexpr Wanted kInputNorm = {"norm_place", [](const DecoderSpec& s) { return s.norms_input(); }};
constexpr Wanted kOutputNorm = {"norm_place", [](const DecoderSpec& s) { return s.norms_output(); }};
constexpr Wanted kQkNorm = {"qk_norm", [](const DecoderSpec& s) { return s.qk_norm; }};
constexpr Wanted kSubNorm = {"sub_norm", [](const DecoderSpec& s) { return s.sub_norm; }};
constexpr Wanted kSinks = {"sinks", [](const DecoderSpec& s) { return s.sinks; }};

struct VectorField {
  const char* name;
  std::vector<float> DecoderLayer::* field;
  size_t (*size)(const DecoderSpec&);
  Wanted wanted;
};
constexpr VectorField kVectors[] = {
    {"input_norm", &DecoderLayer::input_norm, hidden, kInputNorm},
    {"input_norm_bias", &DecoderLayer::input_norm_bias, hidden, kOptional},
    {"attn_out_norm", &DecoderLayer::attn_out_norm, hidden, kOutputNorm},
    {"post_norm", &DecoderLayer::post_norm, hidden, kInputNorm},
    {"post_norm_bias", &DecoderLayer::post_norm_bias, hidden, kOptional},
    {"mlp_out_norm", &DecoderLayer::mlp_out_norm, hidden, kOutputNorm},
    {"q_norm", &DecoderLayer::q_norm, query_norm, kQkNorm},
    {"k_norm", &DecoderLayer::k_norm, key_norm, kQkNorm},
    {"attn_sub_norm", &DecoderLayer::attn_sub_norm, queries, kSubNorm},
    {"ffn_sub_norm", &DecoderLayer::ffn_sub_norm, inner, kSubNorm},
    {"sinks", &DecoderLayer::sinks, heads, kSinks},
    {"q_bias", &DecoderLayer::q_bias, queries, kOptional},
    {"k_bias", &DecoderLayer::k_bias, keys, kOptional},
    {"v_bias", &DecoderLayer::v_bias, keys, kOptional},
    {"o_bias", &DecoderLayer::o_bias, hidden, kOptional},
    {"gate_bias", &DecoderLayer::gate_bias, inner, kOptional},
    {"up_bias", &DecoderLayer::up_bias, inner, kOptional},
    {"down_bias", &DecoderLayer::down_bias, hidden, kOptional},
};

void check_matrix(const std::string& name, const Matrix* m, size_t out, size_t in) {
  if (!m) refuse("Decoder.finish: matrix '" + name + "' is not set; call set_matrix");
  if (m->out_features != out || m->in_features != in)
    refuse("Decoder.finish: matrix '" + name + "' has shape [" + text(m->out_features) + ", " +
           text(m->in_features) + "], the description needs [" + text(out) + ", " + text(in) + "]");
  if (!m->reads_integers() && !m->reads_values())
    refuse("Decoder.finish: matrix '" + name + "' has no terms; add one before set_matrix");
}

std::string layer_name(size_t layer, const char* field) { return "layers." + text(layer) + "." + field; }

}  // namespace

Decoder::Decoder(const DecoderSpec& spec) : spec_(spec) {
  constexpr size_t kLimit = size_t{1} << 24;
  require_range("n_layers", spec.n_layers, 1, 4096);
  require_range("hidden_size", spec.hidden_size, 1, kLimit);
  require_range("intermediate_size", spec.intermediate_size, 1, kLimit);
  require_range("n_heads", spec.n_heads, 1, 4096);
  require_range("n_kv_heads", spec.n_kv_heads, 1, spec.n_heads);
  require_range("vocab_size", spec.vocab_size, 1, size_t{1} << 30);
  require_range("head_dim", spec.head_dim, 8, 1024);
  if (spec.head_dim % 8)
    refuse("Decoder: head_dim=" + text(spec.head_dim) +
           " must be a multiple of 8; pad the heads of q, k, v and o with zeros");
  if (spec.n_heads % spec.n_kv_heads)
    refuse("Decoder: n_heads=" + text(spec.n_heads) +
           " must be a multiple of n_kv_heads=" + text(spec.n_kv_heads));
  require_range("rotary_dim", spec.rotary_dim, 0, spec.head_dim);
  if (spec.rotary_dim % 2) refuse("Decoder: rotary_dim=" + text(spec.rotary_dim) + " must be even");
  if (spec.activation_bits != 8 && spec.activation_bits != 16)
    refuse("Decoder: activation_bits=" + std::to_string(spec.activation_bits) + " must be 8 or 16");
  if (spec.kv_bits != 2 && spec.kv_bits != 4 && spec.kv_bits != 8 && spec.kv_bits != 16)
    refuse("Decoder: kv_bits=" + std::to_string(spec.kv_bits) + " must be 2, 4, 8 or 16");
  if (!(spec.norm_eps >= 0 && spec.norm_eps < 1))
    refuse("Decoder: norm_eps=" + std::to_string(spec.norm_eps) + " must be 0 to 1");
  if (!(spec.attention_scale > 0) || !std::isfinite(spec.attention_scale))
    refuse("Decoder: attention_scale=" + std::to_string(spec.attention_scale) +
           " must be a positive number, usually head_dim ** -0.5");
  if (spec.n_experts) {
    require_range("n_experts", spec.n_experts, 1, 65536);
    require_range("experts_per_token", spec.experts_per_token, 1, spec.n_experts);
    require_range("expert_size", spec.expert_size, 1, kLimit);
    if (spec.sub_norm) refuse("Decoder: sub_norm is not a part of layers with experts");
    if (!spec.gated) refuse("Decoder: experts need gated=true");
  }
  if (!spec.sparse_layers.empty() && (spec.sparse_layers.size() != spec.n_layers || !spec.n_experts))
    refuse("Decoder: sparse_layers has " + text(spec.sparse_layers.size()) +
           " entries, needs n_layers=" + text(spec.n_layers) + " and n_experts of 1 or more");
  for (const auto& [name, cap] : {std::pair<const char*, float>{"attention_softcap", spec.attention_softcap},
                                  {"logit_softcap", spec.logit_softcap}})
    if (!(cap >= 0) || !std::isfinite(cap) || (cap > 0 && cap < 1e-3f))
      refuse(std::string("Decoder: ") + name + "=" + std::to_string(cap) +
             " must be 0 (none) or at least 0.001");
  if (!std::isfinite(spec.embedding_scale))
    refuse("Decoder: embedding_scale=" + std::to_string(spec.embedding_scale) + " must be a number");
  if (spec.parallel && spec.norm_place != NormPlace::pre)
    refuse("Decoder: parallel halves run with norm_place=pre only");
  if (!spec.gated && spec.activation == Activation::swiglu_clamped)
    refuse("Decoder: activation=swiglu_clamped needs gated=true");
  layers_.resize(spec.n_layers);
  for (size_t i = 0; i < spec.n_layers; ++i)
    if (spec.sparse(i)) layers_[i].sparse.experts.resize(spec.n_experts);
  for (DecoderLayer& layer : layers_) layer.rotates = spec.rotary_dim > 0;
}

Decoder::~Decoder() = default;

void Decoder::need_open(const std::string& name) const {
  if (finished_) refuse("Decoder: '" + name + "' set after finish(); a finished decoder does not change");
}

size_t Decoder::layer_number(const std::string& name, std::string* rest) const {
  const std::string prefix = "layers.";
  const size_t dot = name.find('.', prefix.size());
  if (name.compare(0, prefix.size(), prefix) == 0 && dot != std::string::npos) {
    const std::string digits = name.substr(prefix.size(), dot - prefix.size());
    if (!digits.empty() && digits.size() <= 6 &&
        digits.find_first_not_of("0123456789") == std::string::npos) {
      const size_t number = std::stoul(digits);
      if (number >= spec_.n_layers)
        refuse("Decoder: '" + name + "' names layer " + digits +
               ", the description has n_layers=" + text(spec_.n_layers));
      *rest = name.substr(dot + 1);
      return number;
    }
  }
  refuse("Decoder: '" + name +
         "' is not a weight; expected embed, head, positions, norm, norm_bias or layers.N.<field>");
}

void Decoder::set_matrix(const std::string& name, const Matrix* matrix) {
  need_open(name);
  if (name == "embed") {
    embed_ = matrix;
    return;
  }
  if (name == "head") {
    head_ = matrix;
    return;
  }
  if (name == "positions") {
    if (!spec_.learned_positions)
      refuse("Decoder.set_matrix: 'positions' would be ignored; set positions=learned in the description");
    positions_ = matrix;
    return;
  }
  std::string field;
  DecoderLayer& layer = layers_[layer_number(name, &field)];
  if (field == "gate" && !spec_.gated)
    refuse("Decoder.set_matrix: '" + name + "' would be ignored; set gated in the description to use it");
  for (const MatrixField& f : kMatrices) {
    if (field != f.name) continue;
    layer.*f.field = matrix;
    return;
  }
  if (const Matrix** place = layer.sparse.matrix(field)) {
    *place = matrix;
    return;
  }
  refuse("Decoder.set_matrix: '" + name + "' is not a matrix; expected q, k, v, o, gate, up or down");
}

void Decoder::set_vector(const std::string& name, const float* values, size_t count) {
  need_open(name);
  for (size_t i = 0; i < count; ++i)
    if (!std::isfinite(values[i]))
      refuse("Decoder.set_vector: '" + name + "' is not finite at index " + text(i) +
             "; check the checkpoint");
  const auto set = [&](std::vector<float>& target, size_t size) {
    if (count != size)
      refuse("Decoder.set_vector: '" + name + "' has " + text(count) + " values, the description needs " +
             text(size));
    target.assign(values, values + count);
  };
  if (name == "norm") return set(norm_, spec_.hidden_size);
  const bool shift = name.size() > 9 && name.compare(name.size() - 9, 9, "norm_bias") == 0;
  if ((name == "norm_bias" || shift) && spec_.norm != NormKind::layer)
    refuse("Decoder.set_vector: '" + name +
           "' would be ignored; set norm=layer in the description to use it");
  if (name == "norm_bias") return set(norm_bias_, spec_.hidden_size);
  std::string field;
  DecoderLayer& layer = layers_[layer_number(name, &field)];
  for (const VectorField& f : kVectors) {
    if (field != f.name) continue;
    if (f.wanted.field && !f.wanted.present(spec_))
      refuse("Decoder.set_vector: '" + name + "' would be ignored; set " + f.wanted.field +
             " in the description to use it");
    if (field == "gate_bias" && !spec_.gated)
      refuse("Decoder.set_vector: '" + name + "' would be ignored; set gated in the description to use it");
    return set(layer.*f.field, f.size(spec_));
  }
  if (std::vector<float>* place = layer.sparse.vector(field)) {
    const bool of_router = field == "router_bias";
    const bool of_down = field.size() > 9 && field.compare(field.size() - 9, 9, "down_bias") == 0;
    return set(*place, of_router ? spec_.n_experts : of_down ? spec_.hidden_size : spec_.expert_size);
  }
  refuse("Decoder.set_vector: '" + name + "' is not a vector of this decoder");
}

Rotation Decoder::rotation(const char* call, const float* inverse_frequencies, size_t count,
                           float attention_factor, const std::vector<bool>& layers) const {
  need_open("rope");
  const std::string name = call;
  if (count != spec_.rotary_dim / 2)
    refuse(name + ": " + text(count) + " frequencies, rotary_dim=" + text(spec_.rotary_dim) + " needs " +
           text(spec_.rotary_dim / 2));
  if (layers.size() != spec_.n_layers)
    refuse(name + ": layer_mask has " + text(layers.size()) +
           " entries, needs n_layers=" + text(spec_.n_layers));
  for (size_t i = 0; i < count; ++i)
    if (!std::isfinite(inverse_frequencies[i])) refuse(name + ": frequency " + text(i) + " is not finite");
  if (!std::isfinite(attention_factor)) refuse(name + ": attention_factor is not finite");
  return {std::vector<float>(inverse_frequencies, inverse_frequencies + count), attention_factor};
}

void Decoder::set_rope(const float* inverse_frequencies, size_t count, float attention_factor,
                       const std::vector<bool>& layers) {
  rotations_[0] = rotation("Decoder.set_rope", inverse_frequencies, count, attention_factor, layers);
  for (size_t i = 0; i < layers.size(); ++i) layers_[i].rotates = layers[i] && count > 0;
}

void Decoder::set_local_rope(const float* inverse_frequencies, size_t count, float attention_factor,
                             const std::vector<bool>& layers) {
  rotations_.resize(1);
  rotations_.push_back(
      rotation("Decoder.set_local_rope", inverse_frequencies, count, attention_factor, layers));
  for (size_t i = 0; i < layers.size(); ++i) layers_[i].local = layers[i];
}

void Decoder::set_windows(const std::vector<int64_t>& windows) {
  need_open("windows");
  if (windows.size() != spec_.n_layers)
    refuse("Decoder.set_windows: " + text(windows.size()) +
           " windows, needs n_layers=" + text(spec_.n_layers));
  for (size_t i = 0; i < windows.size(); ++i) {
    if (windows[i] < 0)
      refuse("Decoder.set_windows: window " + std::to_string(windows[i]) + " of layer " + text(i) +
             " must be 0 (all positions) or more");
    layers_[i].window = static_cast<size_t>(windows[i]);
  }
}

void Decoder::check_experts(size_t index) const {
  const ExpertLayer& layer = layers_[index].sparse;
  check_matrix(layer_name(index, "router"), layer.router, spec_.n_experts, spec_.hidden_size);
  for (size_t j = 0; j < layer.experts.size(); ++j) {
    const Expert& e = layer.experts[j];
    const std::string name = layer_name(index, "experts.") + text(j);
    check_matrix(name + ".gate", e.gate, spec_.expert_size, spec_.hidden_size);
    check_matrix(name + ".up", e.up, spec_.expert_size, spec_.hidden_size);
    check_matrix(name + ".down", e.down, spec_.hidden_size, spec_.expert_size);
  }
}

void Decoder::finish() {
  if (finished_) return;
  check_matrix("embed", embed_, spec_.vocab_size, spec_.hidden_size);
  check_matrix("head", head_, spec_.vocab_size, spec_.hidden_size);
  if (norm_.empty()) refuse("Decoder.finish: vector 'norm' is not set; call set_vector");
  for (size_t i = 0; i < spec_.n_layers; ++i) {
    const bool sparse = spec_.sparse(i);
    for (const MatrixField& f : kMatrices)
      if (!spec_.gated && f.field == &DecoderLayer::gate)
        continue;
      else if (!sparse || !of_mlp(f))
        check_matrix(layer_name(i, f.name), layers_[i].*f.field, f.out(spec_), f.in(spec_));
      else if (layers_[i].*f.field)
        refuse("Decoder.finish: matrix '" + layer_name(i, f.name) +
               "' is set, but the layer has experts; set those of experts.J");
    if (sparse) check_experts(i);
    for (const VectorField& f : kVectors) {
      if (f.wanted.field && f.wanted.present(spec_) && (layers_[i].*f.field).empty())
        refuse("Decoder.finish: vector '" + layer_name(i, f.name) + "' is not set; call set_vector");
    }
  }
  if (spec_.learned_positions) {
    check_matrix("positions", positions_, positions_ ? positions_->out_features : 0, spec_.hidden_size);
    if (positions_->out_features <= spec_.position_offset)
      refuse("Decoder.finish: 'positions' has " + text(positions_->out_features) +
             " rows, too few for position_offset=" + text(spec_.position_offset));
  }
  if (rotations_[0].inverse_frequencies.size() != spec_.rotary_dim / 2)
    refuse("Decoder.finish: rotary_dim=" + text(spec_.rotary_dim) + " but no frequencies; call set_rope");
  workspace_ = std::make_unique<DecoderWorkspace>(*this);
  finished_ = true;
}

}  // namespace lowbit
