// Keys, values and queries of one token and head into the forms that attention reads. See kv_cache.h.
#include "decoder_kernels.h"
#include "kv_cache.h"
#include "quantize.h"
#include "rows.h"

namespace lowbit::LOWBIT_ISA {
namespace {

constexpr float kLargestFp16 = 65504.0f;

// Cut to what fp16 holds. The bounds come first, so NaN stays NaN.
LOWBIT_INLINE F32 saturate(F32 v) { return max(set1(-kLargestFp16), min(set1(kLargestFp16), v)); }

void store_key(const float* key, size_t head_dim, size_t position, uint16_t* segment_keys) {
  const size_t slot = position % kSegment;
  uint16_t* out = segment_keys + slot / kKeyLanes * kKeyLanes * head_dim + slot % kKeyLanes;
  for (size_t i = 0; i < head_dim; i += 16) {
    const size_t left = head_dim - i < 16 ? head_dim - i : 16;
    uint16_t narrow[16];
    store_fp16(narrow, saturate(load_up_to(key + i, left)));
    for (size_t k = 0; k < left; ++k) out[(i + k) * kKeyLanes] = narrow[k];
  }
}

void store_value(const float* value, const float* bias, size_t head_dim, size_t stride, size_t position,
                 uint16_t* segment_values) {
  uint16_t* out = segment_values + position % kSegment * stride;
  for (size_t i = 0; i < head_dim; i += 16) {
    F32 v = load_up_to(value + i, head_dim - i);
    if (bias) v = add(v, load_up_to(bias + i, head_dim - i));
    store_fp16(out + i, saturate(v));
  }
}

// The largest of n magnitudes; NaN if one is NaN or infinite.
float largest_magnitude(const float* x, size_t n) {
  Peak peak;
  for (size_t i = 0; i < n; i += 16) peak.see(load_tail(x, i, n));
  return peak.close() + reduce_add(peak.poison);
}

// round(x / scale) of up to 64 numbers, |x| <= 127 * scale; returns scale. Zeros give zeros.
float round_group(const float* x, size_t n, int8_t* out) {
  const float peak = largest_magnitude(x, n);
  const F32 inverse = set1(peak > 1e-30f ? 127.0f / peak : 0.0f);
  for (size_t i = 0; i < n; i += 16) store_i8(out + i, to_i32(round_even(mul(load_tail(x, i, n), inverse))));
  return peak / 127.0f;
}

void round_query(const float* query, size_t head_dim, int8_t* out, float* scales, int32_t* starts) {
  for (size_t d = 0, g = 0; d < head_dim; d += kKeyGroup, ++g) {
    const size_t n = head_dim - d < kKeyGroup ? head_dim - d : kKeyGroup;
    scales[g] = round_group(query + d, n, out + d) * kLog2e;
    int32_t sum = 0;
    for (size_t i = 0; i < n; ++i) sum += out[d + i];
    starts[g] = -128 * sum;
  }
}

void store_integer_key(const float* key, size_t head_dim, size_t position, const KvIntegers& kv) {
  const size_t slot = position % kSegment, lane = slot % kKeyLanes;
  uint8_t* out = kv.keys + (slot - lane) * head_dim + 4 * lane;
  int8_t codes[kKeyGroup];
  for (size_t d = 0, g = 0; d < head_dim; d += kKeyGroup, ++g) {
    const size_t n = head_dim - d < kKeyGroup ? head_dim - d : kKeyGroup;
    kv.key_scales[g * kSegment + slot] = round_group(key + d, n, codes);
    for (size_t i = 0; i < n; i += 4) {
      uint32_t four;
      __builtin_memcpy(&four, codes + i, 4);
      four ^= 0x80808080u;
      __builtin_memcpy(out + (d + i) * kKeyLanes, &four, 4);
    }
  }
}

// log2(x) of a positive normal number within 3e-6: x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
float binary_logarithm(float x) {
  uint32_t pattern;
  __builtin_memcpy(&pattern, &x, 4);
  const uint32_t offset = pattern - 0x3f3504f3u;  // sqrt(1/2)
  const float exponent = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  pattern = (offset & 0x007fffffu) + 0x3f3504f3u;
  float m;
  __builtin_memcpy(&m, &pattern, 4);
  const float r = m - 1.0f;
  float p = -0x1.a71982p-3f;
  for (const float c : {0x1.49e2fap-2f, -0x1.784f4ep-2f, 0x1.eada34p-2f, -0x1.713832p-1f, 0x1.7155acp+0f})
    p = p * r + c;
  return p * r + exponent;
}

void store_integer_value(const float* value, const float* bias, size_t head_dim, size_t stride,
                         size_t position, const KvIntegers& kv) {
  const size_t slot = position % kSegment, block = slot / 64, word = slot % 16, byte = slot % 64 / 16;
  int8_t* out = kv.values + (block * 16 + word) * 4 * stride + byte;
  const float* x = value;
  float biased[1024];  // the largest head_dim
  if (bias) {
    for (size_t i = 0; i < head_dim; i += 16)
      store(biased + i, add(load_tail(value, i, head_dim), load_tail(bias, i, head_dim)));
    x = biased;
  }
  // Below this values count as zero, so that the logarithm stays far from where weights vanish.
  const float peak = largest_magnitude(x, head_dim);
  const float scale = (peak < 1e-18f ? 1e-18f : peak) / 127.0f;
  const F32 inverse = set1(1.0f / scale);
  int8_t codes[16];
  for (size_t d = 0; d < stride; d += 16) {
    store_i8(codes, to_i32(round_even(mul(load_tail(x, d, head_dim), inverse))));
    for (size_t i = 0; i < 16; ++i) out[4 * (d + i)] = codes[i];
  }
  // A NaN or an infinity spoils the weights of whoever sees it, and nobody else's.
  const bool finite = scale < __builtin_inff();
  kv.value_logs[slot] = finite ? binary_logarithm(scale) : __builtin_nanf("");
  kv.value_inverses[slot] = finite ? 1.0f / scale : 1.0f;
}

}  // namespace

void add_kv_kernels(DecoderKernels& table) {
  table.store_key = store_key;
  table.store_value = store_value;
  table.round_query = round_query;
  table.store_integer_key = store_integer_key;
  table.store_integer_value = store_integer_value;
}

}  // namespace lowbit::LOWBIT_ISA
