// The functions of the decoder step that are compiled once per instruction set.
// All of them give the same bits on every instruction set: see simd/simd.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "integer_row.h"

namespace lowbit {

// Of the gate, which multiplies `up`; swiglu_clamped (gpt-oss) changes both: min(gate, 7) *
// sigmoid(1.702 gate) * (clip(up, -7, 7) + 1).
enum class Activation : uint8_t { silu, relu2, gelu_tanh, gelu, relu, swiglu_clamped };

// What turns a projected head into a query or key, in this order: bias, norm, rotation, scale.
struct HeadPreparation {
  size_t head_dim;
  const float* bias;  // [head_dim] or null
  const float* norm;  // RMSNorm weight [head_dim] or null
  float norm_eps;
  const float* cosine;  // [half] or null where the layer does not rotate
  const float* sine;    // [half]
  size_t half;          // rotary_dim / 2; dimension i turns with i + half
  float scale;
};

// Queries of one key-value head over one segment: row = query * group + head within the group, so that the
// rows of a query stand together and all share each key and value that is loaded.
struct AttentionTile {
  const float* queries;  // [rows][stride], prepared and scaled
  size_t rows;
  size_t group;  // query heads per key-value head
  size_t head_dim;
  size_t stride;           // head_dim rounded up to 16
  size_t position;         // of the first query; the others follow
  size_t window;           // a query at i sees keys j with i - j < window; 0: all up to i
  float softcap;           // scores become softcap * tanh(score / softcap); 0: they stay
  ptrdiff_t segment_step;  // numbers from a head's keys in this segment to those in the next
};

// Softmax in progress: exponentials relative to `peak`, their sum, and the sum of values weighted by them.
struct AttentionState {
  float* peak;   // [rows]
  float* sum;    // [rows]
  float* mixed;  // [rows][stride]
};

// The same over 8-bit keys and values: rows are rounded queries, see isa/attention_integer.cc.
struct IntegerTile {
  const int8_t* queries;  // [rows][stride]
  const float* scales;    // [rows][groups], times log2(e): scores are binary logarithms
  const int32_t* starts;  // [rows][groups], -128 * the sum of the group: what makes up for keys plus 128
  size_t rows;
  size_t group;   // query heads per key-value head
  size_t groups;  // of 64 channels in a head
  size_t head_dim;
  size_t stride;
  size_t position;
  size_t window;
  float softcap;  // of binary logarithms
};
struct KvIntegers;

struct DecoderKernels {
  // x += y + bias where y is not null (bias may be), then out = x / sqrt(mean(x^2) + eps) * weight, and out's
  // integers where row is not null. out may be x.
  void (*norm)(float* x, const float* y, const float* bias, const float* weight, size_t n, float eps,
               float* out, const IntegerRow* row);
  // The same with LayerNorm: out = (x - mean) / sqrt(variance + eps) * weight + shift; shift may be null.
  void (*layer_norm)(float* x, const float* y, const float* bias, const float* weight, const float* shift,
                     size_t n, float eps, float* out, const IntegerRow* row);
  // x += y + bias (both may be null), out = x, and its integers where row is not null. out may be x or y.
  void (*add)(float* x, const float* y, const float* bias, size_t n, float* out, const IntegerRow* row);
  // x = cap * tanh(x / cap).
  void (*softcap)(float* x, size_t n, float cap);
  // out = activation(gate + gate_bias) * (up + up_bias), or activation(gate + gate_bias) where up is null,
  // and its integers where row is not null; biases may be null, out may be gate.
  void (*activate)(Activation kind, const float* gate, const float* gate_bias, const float* up,
                   const float* up_bias, size_t n, float* out, const IntegerRow* row);
  void (*prepare_head)(const HeadPreparation& p, const float* x, float* out);
  // Stores a key at lane `position % 16` of its group of sixteen, and a value with its padding. Magnitudes
  // beyond 65504 are cut to it; bias may be null.
  void (*store_key)(const float* key, size_t head_dim, size_t position, uint16_t* segment_keys);
  void (*store_value)(const float* value, const float* bias, size_t head_dim, size_t stride, size_t position,
                      uint16_t* segment_values);

  // The state of a tile over the keys of one segment (first position `segment`) that it may see.
  // scratch: 64 * (head_dim + stride) floats.
  void (*attend)(const AttentionTile& tile, const uint16_t* keys, const uint16_t* values, size_t segment,
                 const AttentionState& state, float* scratch);

  // 8 bit: rounds a prepared query (a row of IntegerTile); stores a key, and a value with its padding.
  void (*round_query)(const float* query, size_t head_dim, int8_t* out, float* scales, int32_t* starts);
  void (*store_integer_key)(const float* key, size_t head_dim, size_t position, const KvIntegers& kv);
  void (*store_integer_value)(const float* value, const float* bias, size_t head_dim, size_t stride,
                              size_t position, const KvIntegers& kv);
  // Attention over one segment; folded into `state` unless that is fresh.
  void (*attend_integers)(const IntegerTile& tile, const KvIntegers& kv, size_t segment, bool fresh,
                          const AttentionState& state);

  // 4 and 2 bit: a complete page of 16-bit keys and values, the one of `position`, becomes codes of `head` in
  // its segment; and the state of a tile, whose queries lie in one page, over one segment: earlier pages are
  // read as codes, their own in 16 bit. scratch as for attend().
  void (*seal_page)(int bits, const uint16_t* keys, const uint16_t* values, size_t head_dim, size_t stride,
                    size_t position, uint8_t* head);
  void (*attend_pages)(const AttentionTile& tile, int bits, const uint8_t* head, const uint16_t* own_keys,
                       const uint16_t* own_values, size_t segment, const AttentionState& state,
                       float* scratch);

  // Folds the state of the next segment into the state of all earlier ones; peaks are logarithms in `unit`.
  void (*merge)(size_t rows, size_t stride, float unit, const AttentionState& total,
                const AttentionState& part);
  // Lets a score without a value take part in one row's softmax, once all segments are folded. unit as in
  // merge(); level: the weight that a score as large as the peak has.
  void (*add_sink)(const AttentionState& total, size_t row, size_t stride, float unit, float level,
                   float score);
  // out[0 .. head_dim) = mixed / sum of one row.
  void (*finish)(const AttentionState& total, size_t row, size_t head_dim, size_t stride, float* out);

  // The largest of n values, and the sum of exp((x - peak) * inverse_temperature).
  float (*largest)(const float* x, size_t n);
  float (*exp_sum)(const float* x, size_t n, float peak, float inverse_temperature);
  // out = exp(x - peak); sum += weight * (x + bias), or = where `fresh` (bias may be null).
  void (*exponentials)(const float* x, size_t n, float peak, float* out);
  void (*add_weighted)(float* sum, const float* x, const float* bias, float weight, size_t n, bool fresh);
};

// Keys that attention looks at together; blocks lie at fixed positions, so a query's arithmetic does not
// depend on its companions.
constexpr size_t kAttentionBlock = 64;

// Peaks of float attention are natural logarithms, those of integer attention binary ones.
constexpr float kLn2 = 0x1.62e430p-1f;
constexpr float kLog2e = 0x1.715476p+0f;
// The largest weight of a key in integer attention.
constexpr float kWeightLevels = 255;

// The table of the active instruction set.
const DecoderKernels& decoder_kernels();

}  // namespace lowbit
