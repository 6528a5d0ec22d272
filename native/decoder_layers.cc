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
      rows_(workspace.count_) {}

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
  for (size_t i = 0; i < spec_.n_layers; ++i) {
    const DecoderLayer& layer = decoder_.layer(i);
    const bool first = i == 0;
    normalize(first ? nullptr : from_mlp(i - 1), first ? layer.o_bias : decoder_.layer(i - 1).down_bias,
              layer.input_norm);
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
  size_t begin, end;
  own_rows(rows_, &begin, &end);
  for (size_t row = begin; row < end; ++row)
    dequantize_row(decoder_.embedding(), static_cast<size_t>((*w_.tokens_)[w_.first_token_ + row]),
                   lane_.stream.get() + row * spec_.hidden_size);
  // Angles are float32 products, as in training; sines and cosines of them in double.
  const std::vector<float>& frequencies = decoder_.inverse_frequencies();
  const size_t half = frequencies.size();
  const float factor = decoder_.attention_factor();
  for (const Slice& slice : w_.slices_) {
    for (size_t i = 0; i < slice.count; ++i) {
      const size_t row = slice.row + i;
      if (row < begin || row >= end) continue;
      float* cosine = lane_.rotation.get() + row * spec_.rotary_dim;
      for (size_t k = 0; k < half; ++k) {
        const float angle = static_cast<float>(slice.position + i) * frequencies[k];
        cosine[k] = static_cast<float>(std::cos(static_cast<double>(angle))) * factor;
        cosine[half + k] = static_cast<float>(std::sin(static_cast<double>(angle))) * factor;
      }
    }
  }
}

// stream += delta + bias; normed = norm(stream), also as integers.
void Walk::normalize(const float* delta, const std::vector<float>& bias, const std::vector<float>& weight) {
  const size_t n = spec_.hidden_size;
  size_t begin, end;
  own_rows(rows_, &begin, &end);
  for (size_t row = begin; row < end; ++row)
    norm_row(row, delta ? delta + row * w_.hidden_stride_ : nullptr, bias, weight, normed_row(row, n),
             integer_row(lane_.hidden, row));
  sync();
}

// Where a normed row goes: a place of its own if anybody reads it later.
float* Walk::normed_row(size_t row, size_t size) const {
  return lane_.normed.get() + (w_.normed_floats_ ? row * size : member_.id * w_.normed_size());
}

void Walk::norm_row(size_t row, const float* delta, const std::vector<float>& bias,
                    const std::vector<float>& weight, float* out, const IntegerRow& integers) {
  const size_t n = spec_.hidden_size;
  kernels_.norm(lane_.stream.get() + row * n, delta, data_or_null(bias), weight.data(), n, spec_.norm_eps,
                out, &integers);
}

void Walk::attention_half(size_t index) {
  const DecoderLayer& layer = decoder_.layer(index);
  const size_t q = spec_.q_size(), kv = spec_.kv_size(), stride = w_.qkv_stride_;
  float* qkv = w_.qkv_;
  const Product inputs[] = {
      {layer.q, qkv, stride}, {layer.k, qkv + q, stride}, {layer.v, qkv + q + kv, stride}};
  product(inputs, 3, lane_.hidden);
  barrier();
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
}

void Walk::mlp_half(const DecoderLayer& layer) {
  normalize(w_.from_attention_, layer.o_bias, layer.post_norm);
  if (!layer.sparse.experts.empty()) return expert_half(layer.sparse);
  const size_t n = spec_.intermediate_size;
  const size_t stride = w_.inner_stride_;
  const Product inputs[] = {{layer.gate, w_.gate_.get(), stride}, {layer.up, w_.up_, stride}};
  product(inputs, 2, lane_.hidden);
  barrier();

  size_t begin, end;
  own_rows(rows_, &begin, &end);
  for (size_t row = begin; row < end; ++row) {
    float* out = lane_.activated.get() + (w_.inner_floats_ ? row : member_.id) * n;
    const IntegerRow integers = integer_row(lane_.inner, row);
    const IntegerRow* wanted = layer.down->reads_integers() ? &integers : nullptr;
    kernels_.activate(spec_.activation, w_.gate_.get() + row * stride, data_or_null(layer.gate_bias),
                      w_.up_ + row * stride, data_or_null(layer.up_bias), n, out,
                      spec_.sub_norm ? nullptr : wanted);
    if (spec_.sub_norm)
      kernels_.norm(out, nullptr, nullptr, layer.ffn_sub_norm.data(), n, spec_.norm_eps, out, wanted);
  }
  sync();
  const Product output = {layer.down, w_.from_mlp_, w_.hidden_stride_};
  product(&output, 1, lane_.inner);
  barrier();
}

}  // namespace lowbit
