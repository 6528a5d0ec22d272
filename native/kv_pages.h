// Keys and values in 4 or 2 bits: pages of 64 positions.
//
//   key   = scale * code + least        a scale and a least value for each channel of a page
//   value = scale * (2 * code - top)    a scale for each token; top is the largest code
//
// for a few channels of keys are large at every position and far from zero, while the magnitude of values
// goes with the token (KIVI, arXiv:2402.02750). A scale is a byte, one of 255 numbers (1 + m / 8) * 2^e;
// `least` is fp16. Within a page of one head, 8 / bits positions share a byte, the first in its low bits:
//   keys         [head_dim][8 * bits]   64 keys of a channel: byte j holds keys j, j + 8 * bits, ...
//   values       [8 * bits][stride]     64 tokens: row j holds tokens j, j + 8 * bits, ...
//   key_leasts   [head_dim] fp16
//   key_scales   [head_dim] bytes
//   value_scales [64] bytes
// A head of a block has first_key [head_dim] fp16 and four such pages. The first key of a text is far larger
// than all others in some channels: it stays in 16 bit, and its page is made as if the second key stood in
// its place. With heads of 64 channels that is 4.28 or 2.28 bits for a number.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

constexpr size_t kKvPage = 64;

// Bytes of scales: exponent e and mantissa m as (e + kScaleBias) * 8 + m; 255 is NaN, which spoils the page
// for whoever sees it.
constexpr int kScaleBias = 17;
constexpr uint8_t kScaleNan = 255;
constexpr uint8_t kScaleLargest = 254;

inline float page_scale(uint8_t byte) {
  if (byte == kScaleNan) return __builtin_nanf("");
  const uint32_t pattern =
      (static_cast<uint32_t>(byte) << 20) + (static_cast<uint32_t>(127 - kScaleBias) << 23);
  float scale;
  __builtin_memcpy(&scale, &pattern, 4);
  return scale;
}

struct KvPage {
  uint8_t *keys, *values;
  uint16_t* key_leasts;
  uint8_t *key_scales, *value_scales;

  static size_t bytes(size_t head_dim, size_t stride, int bits) {
    return (head_dim + stride) * kKvPage * static_cast<size_t>(bits) / 8 + 3 * head_dim + kKvPage;
  }
  KvPage(uint8_t* page, size_t head_dim, size_t stride, int bits) {
    const size_t row = kKvPage * static_cast<size_t>(bits) / 8;
    keys = page;
    values = keys + head_dim * row;
    key_leasts = reinterpret_cast<uint16_t*>(values + stride * row);
    key_scales = reinterpret_cast<uint8_t*>(key_leasts + head_dim);
    value_scales = key_scales + head_dim;
  }
  // Of a head of a block: the first key, and page `n`.
  static uint16_t* first_key(uint8_t* head) { return reinterpret_cast<uint16_t*>(head); }
  static uint8_t* at(uint8_t* head, size_t n, size_t head_dim, size_t stride, int bits) {
    return head + head_dim * sizeof(uint16_t) + n * bytes(head_dim, stride, bits);
  }
};

}  // namespace lowbit
