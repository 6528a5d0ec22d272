// The way of one member through the layers of a pass. See decoder_step.h for the barriers.
#include "decoder_step.h"

#include <cmath>

namespace lowbit {
namespace {

const float* data_or_null(const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); }

}  // namespace

Walk::Walk(DecoderWorkspace& workspace, const Member& member)
    : w_(workspace),
      decoder_(workspace.decoder_),
      spec_(workspace.spec_),
      kernels_(decoder_kernels()),
      member_(member),
      lane_(*workspace.lanes_[workspace.redundant_ ? member.id : 0]),
      rows_(workspace.count_),
      clock_(member.id == 0 && workspace.profile.on ? &workspace.profile : nullptr) {}

void Walk::own_rows(size_t rows, size_t* begin, size_t* end) const {
  if (w_.redundant_) {
    *begin = 0;
    *end = rows;
  } else {
    member_.share(rows, begin, end);
  }
}

void Walk::product(const Product* products, size_t count, const Activations& a) {
  Activations present = a;
  present.tokens = rows_;
  matmul(member_, products, count, present, w_.matmul_scratch_[member_.id]);
}

void Walk::run() {
  embed();
  clock_.end(Phase::embed);
  static const std::vector<float> kNone;
  for (size_t i = 0; i < spec_.n_layers; ++i) {
    const DecoderLayer& layer = decoder_.layer(i);
    const DecoderLayer* before = i == 0 ? nullptr : &decoder_.layer(i - 1);
    enter({before ? from_mlp(i - 1) : nullptr, before ? before->down_bias : kNone,
           before ? before->mlp_out_norm : kNone, layer.input_norm, layer.input_norm_bias});
    attention_half(i);
    if (i + 1 == spec_.n_layers) {
      if (w_.wanted_.empty()) return;  // only keys and values were needed
      keep_wanted();
    }
    mlp_half(layer);
  }
  head();
}

void Walk::embed() {
  const size_t n = spec_.hidden_size;
  size_t begin, end;
  own_rows(rows_, &begin, &end);
  for (size_t row = begin; row < end; ++row) {
    float* x = lane_.stream.get() + row * n;
    dequantize_row(decoder_.embedding(), static_cast<size_t>((*w_.tokens_)[w_.first_token_ + row]), x);
    if (spec_.embedding_scale != 1)
      for (size_t i = 0; i < n; ++i) x[i] *= spec_.embedding_scale;
  }
  // Angles are float32 products, as in training; sines and cosines of them in double.
  const size_t half = spec_.rotary_dim / 2;
  for (const Slice& slice : w_.slices_) {
    for (size_t i = 0; i < slice.count; ++i) {
      const size_t row = slice.row + i;
      if (row < begin || row >= end) continue;
      if (const Matrix* positions = decoder_.positions()) {
        float* own = normed_row(row, n);
        dequantize_row(*positions, slice.position + i + spec_.position_offset, own);
        kernels_.add(lane_.stream.get() + row * n, own, nullptr, n, lane_.stream.get() + row * n, nullptr);
      }
      float* cosine = lane_.rotation.get() + row * w_.rotation_stride();
      for (const Rotation& rotation : decoder_.rotations()) {
        for (size_t k = 0; k < half; ++k) {
          const float angle = static_cast<float>(slice.position + i) * rotation.inverse_frequencies[k];
          cosine[k] = static_cast<float>(std::cos(static_cast<double>(angle))) * rotation.factor;
          cosine[half + k] = static_cast<float>(std::sin(static_cast<double>(angle))) * rotation.factor;
        }
        cosine += 2 * half;
      }
    }
  }
}

// Brings `entry` into the stream and leaves what the next half reads, also as integers.
void Walk::enter(const Entry& entry) {
  const size_t n = spec_.hidden_size;
  size_t begin, end;
  own_rows(rows_, &begin, &end);
  for (size_t row = begin; row < end; ++row) {
    Entry own = entry;
    if (own.delta) own.delta += row * w_.hidden_stride_;
    enter_row(row, own, normed_row(row, n), integer_row(lane_.hidden, row));
  }
  sync();
  clock_.end(Phase::norms);
}

// Where a normed row goes: a place of its own if anybody reads it later.
float* Walk::normed_row(size_t row, size_t size) const {
  return lane_.normed.get() + (w_.normed_floats_ ? row * size : member_.id * w_.normed_size());
}

void Walk::norm(float* x, const float* y, const float* bias, const std::vector<float>& weight,
                const float* shift, float* out, const IntegerRow* integers) {
  const size_t n = spec_.hidden_size;
  if (spec_.norm == NormKind::rms)
    kernels_.norm(x, y, bias, weight.data(), n, spec_.norm_eps, out, integers);
  else
    kernels_.layer_norm(x, y, bias, weight.data(), shift, n, spec_.norm_eps, out, integers);
}

void Walk::enter_row(size_t row, const Entry& entry, float* out, const IntegerRow& integers) {
  const size_t n = spec_.hidden_size;
  float* x = lane_.stream.get() + row * n;
  const float *delta = entry.delta, *bias = data_or_null(entry.bias);
  if (delta && !entry.delta_norm.empty()) {  // others may read the row, too: its norm goes to `out`
    for (size_t i = 0; i < n; ++i) out[i] = bias ? delta[i] + bias[i] : delta[i];
    norm(out, nullptr, nullptr, entry.delta_norm, nullptr, out, nullptr);
    delta = out;
    bias = nullptr;
  }
  const float* shift = data_or_null(entry.norm_bias);
  if (entry.late) {
    norm(x, nullptr, nullptr, entry.norm, shift, out, &integers);
    kernels_.add(x, delta, bias, n, x, nullptr);
  } else if (entry.norm.empty()) {
    kernels_.add(x, delta, bias, n, out, &integers);
  } else {
    norm(x, delta, bias, entry.norm, shift, out, &integers);
  }
}

void Walk::attention_half(size_t index) {
  const DecoderLayer& layer = decoder_.layer(index);
  const size_t q = spec_.q_size(), kv = spec_.kv_size(), stride = w_.qkv_stride_;
  float* qkv = w_.qkv_;
  const Product inputs[] = {
      {layer.q, qkv, stride}, {layer.k, qkv + q, stride}, {layer.v, qkv + q + kv, stride}};
  product(inputs, 3, lane_.hidden);
  barrier();
  clock_.end(Phase::qkv);
  if (spec_.qk_norm_whole) {
    norm_heads(layer);
    barrier();
  }
  if (!w_.fused_append_) {
    append_all(index);
    barrier();
    if (!w_.complete_pages_.empty()) {
      seal_all(index);
      barrier();
    }
  }
  attend(index);
  barrier();
  clock_.end(Phase::attention);

  size_t begin, end;
  own_rows(rows_, &begin, &end);
  if (spec_.sub_norm) {
    for (size_t row = begin; row < end; ++row) {
      const IntegerRow integers = integer_row(lane_.attention, row);
      kernels_.norm(w_.attended_ + row * q, nullptr, nullptr, layer.attn_sub_norm.data(), q, spec_.norm_eps,
                    normed_row(row, q), &integers);
    }
  } else if (layer.o->reads_integers()) {
    quantize_rows(lane_.attention, begin, end);
  }
  sync();
  const Product output = {layer.o, w_.from_attention_, w_.hidden_stride_};
  product(&output, 1, lane_.attention);
  barrier();
  clock_.end(Phase::output);
}

// All heads of a query or key together, in place and with their bias.
void Walk::norm_heads(const DecoderLayer& layer) {
  size_t begin, end;
  member_.share(rows_, &begin, &end);
  const auto norm_part = [&](float* x, const std::vector<float>& bias, const std::vector<float>& weight) {
    for (size_t i = 0; i < bias.size(); ++i) x[i] += bias[i];
    kernels_.norm(x, nullptr, nullptr, weight.data(), weight.size(), spec_.norm_eps, x, nullptr);
  };
  for (size_t row = begin; row < end; ++row) {
    float* queries = w_.qkv_ + row * w_.qkv_stride_;
    norm_part(queries, layer.q_bias, layer.q_norm);
    norm_part(queries + spec_.q_size(), layer.k_bias, layer.k_norm);
  }
}

void Walk::mlp_half(const DecoderLayer& layer) {
  enter({w_.from_attention_, layer.o_bias, layer.attn_out_norm, layer.post_norm, layer.post_norm_bias,
         spec_.parallel});
  if (!layer.sparse.experts.empty()) {
    expert_half(layer.sparse);
    clock_.end(Phase::experts);
  } else {
    dense_mlp(layer);
  }
}

void Walk::dense_mlp(const DecoderLayer& layer) {
  const size_t n = spec_.intermediate_size;
  const size_t stride = w_.inner_stride_;
  const Product inputs[] = {{layer.gate, w_.gate_.get(), stride}, {layer.up, w_.up_, stride}};
  const Product alone = {layer.up, w_.gate_.get(), stride};
  const std::vector<float>& gate_bias = spec_.gated ? layer.gate_bias : layer.up_bias;
  if (spec_.gated)
    product(inputs, 2, lane_.hidden);
  else
    product(&alone, 1, lane_.hidden);
  barrier();
  clock_.end(Phase::gate_up);

  size_t begin, end;
  own_rows(rows_, &begin, &end);
  for (size_t row = begin; row < end; ++row) {
    float* out = lane_.activated.get() + (w_.inner_floats_ ? row : member_.id) * n;
    const IntegerRow integers = integer_row(lane_.inner, row);
    const IntegerRow* wanted = layer.down->reads_integers() ? &integers : nullptr;
    kernels_.activate(spec_.activation, w_.gate_.get() + row * stride, data_or_null(gate_bias),
                      spec_.gated ? w_.up_ + row * stride : nullptr, data_or_null(layer.up_bias), n, out,
                      spec_.sub_norm ? nullptr : wanted);
    if (spec_.sub_norm)
      kernels_.norm(out, nullptr, nullptr, layer.ffn_sub_norm.data(), n, spec_.norm_eps, out, wanted);
  }
  sync();
  clock_.end(Phase::activation);
  const Product output = {layer.down, w_.from_mlp_, w_.hidden_stride_};
  product(&output, 1, lane_.inner);
  barrier();
  clock_.end(Phase::down);
}

}  // namespace lowbit
