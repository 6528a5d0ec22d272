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
size_t head_dim(const DecoderSpec& s) { return s.head_dim; }
constexpr MatrixField kMatrices[] = {
    {"q", &DecoderLayer::q, queries, hidden},     {"k", &DecoderLayer::k, keys, hidden},
    {"v", &DecoderLayer::v, keys, hidden},        {"o", &DecoderLayer::o, hidden, queries},
    {"gate", &DecoderLayer::gate, inner, hidden}, {"up", &DecoderLayer::up, inner, hidden},
    {"down", &DecoderLayer::down, hidden, inner},
};

bool of_mlp(const MatrixField& f) { return f.out == inner || f.in == inner; }

enum class Need { always, qk_norm, sub_norm, optional };
struct VectorField {
  const char* name;
  std::vector<float> DecoderLayer::* field;
  size_t (*size)(const DecoderSpec&);
  Need need;
};
constexpr VectorField kVectors[] = {
    {"input_norm", &DecoderLayer::input_norm, hidden, Need::always},
    {"post_norm", &DecoderLayer::post_norm, hidden, Need::always},
    {"q_norm", &DecoderLayer::q_norm, head_dim, Need::qk_norm},
    {"k_norm", &DecoderLayer::k_norm, head_dim, Need::qk_norm},
    {"attn_sub_norm", &DecoderLayer::attn_sub_norm, queries, Need::sub_norm},
    {"ffn_sub_norm", &DecoderLayer::ffn_sub_norm, inner, Need::sub_norm},
    {"q_bias", &DecoderLayer::q_bias, queries, Need::optional},
    {"k_bias", &DecoderLayer::k_bias, keys, Need::optional},
    {"v_bias", &DecoderLayer::v_bias, keys, Need::optional},
    {"o_bias", &DecoderLayer::o_bias, hidden, Need::optional},
    {"gate_bias", &DecoderLayer::gate_bias, inner, Need::optional},
    {"up_bias", &DecoderLayer::up_bias, inner, Need::optional},
    {"down_bias", &DecoderLayer::down_bias, hidden, Need::optional},
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
  }
  if (!spec.sparse_layers.empty() && (spec.sparse_layers.size() != spec.n_layers || !spec.n_experts))
    refuse("Decoder: sparse_layers has " + text(spec.sparse_layers.size()) +
           " entries, needs n_layers=" + text(spec.n_layers) + " and n_experts of 1 or more");
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
  refuse("Decoder: '" + name + "' is not a weight; expected embed, head, norm or layers.N.<field>");
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
  std::string field;
  DecoderLayer& layer = layers_[layer_number(name, &field)];
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
  std::string field;
  DecoderLayer& layer = layers_[layer_number(name, &field)];
  for (const VectorField& f : kVectors) {
    if (field != f.name) continue;
    if ((f.need == Need::qk_norm && !spec_.qk_norm) || (f.need == Need::sub_norm && !spec_.sub_norm))
      refuse("Decoder.set_vector: '" + name + "' would be ignored; set " +
             (f.need == Need::qk_norm ? "qk_norm" : "sub_norm") + " in the description to use it");
    return set(layer.*f.field, f.size(spec_));
  }
  if (std::vector<float>* place = layer.sparse.vector(field)) {
    const bool of_router = field == "router_bias";
    const bool of_down = field.size() > 9 && field.compare(field.size() - 9, 9, "down_bias") == 0;
    return set(*place, of_router ? spec_.n_experts : of_down ? spec_.hidden_size : spec_.expert_size);
  }
  refuse("Decoder.set_vector: '" + name + "' is not a vector of this decoder");
}

void Decoder::set_rope(const float* inverse_frequencies, size_t count, float attention_factor,
                       const std::vector<bool>& layers) {
  need_open("rope");
  if (count != spec_.rotary_dim / 2)
    refuse("Decoder.set_rope: " + text(count) + " frequencies, rotary_dim=" + text(spec_.rotary_dim) +
           " needs " + text(spec_.rotary_dim / 2));
  if (layers.size() != spec_.n_layers)
    refuse("Decoder.set_rope: layer_mask has " + text(layers.size()) +
           " entries, needs n_layers=" + text(spec_.n_layers));
  for (size_t i = 0; i < count; ++i)
    if (!std::isfinite(inverse_frequencies[i]))
      refuse("Decoder.set_rope: frequency " + text(i) + " is not finite");
  if (!std::isfinite(attention_factor)) refuse("Decoder.set_rope: attention_factor is not finite");
  inverse_frequencies_.assign(inverse_frequencies, inverse_frequencies + count);
  attention_factor_ = attention_factor;
  for (size_t i = 0; i < layers.size(); ++i) layers_[i].rotates = layers[i] && count > 0;
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
      if (!sparse || !of_mlp(f))
        check_matrix(layer_name(i, f.name), layers_[i].*f.field, f.out(spec_), f.in(spec_));
      else if (layers_[i].*f.field)
        refuse("Decoder.finish: matrix '" + layer_name(i, f.name) +
               "' is set, but the layer has experts; set those of experts.J");
    if (sparse) check_experts(i);
    for (const VectorField& f : kVectors) {
      const bool needed = f.need == Need::always || (f.need == Need::qk_norm && spec_.qk_norm) ||
                          (f.need == Need::sub_norm && spec_.sub_norm);
      if (needed && (layers_[i].*f.field).empty())
        refuse("Decoder.finish: vector '" + layer_name(i, f.name) + "' is not set; call set_vector");
    }
  }
  if (inverse_frequencies_.size() != spec_.rotary_dim / 2)
    refuse("Decoder.finish: rotary_dim=" + text(spec_.rotary_dim) + " but no frequencies; call set_rope");
  workspace_ = std::make_unique<DecoderWorkspace>(*this);
  finished_ = true;
}

}  // namespace lowbit
