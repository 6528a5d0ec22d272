// Pages of keys and values in 4 or 2 bits: how 64 positions become codes, and attention over the codes. See
// kv_pages.h for the layout.
//
// A page is unpacked to floats and then read like 16-bit keys and values.
#include "kv_pages.h"

#include "attention_block.h"
#include "quantize.h"

namespace lowbit::LOWBIT_ISA {
namespace {

// Scales tried, from the smallest that reaches all numbers of a group downwards, an eighth of an octave at a
// time: with 2 bits it pays to cut the largest numbers short. Measured by perplexity: with more trials it
// gets worse, although the squared error falls.
template <int bits>
constexpr int kTriedOfKeys = bits == 4 ? 1 : 4;
template <int bits>
constexpr int kTriedOfValues = bits == 4 ? 1 : 5;

// The scale byte of the smallest scale that is at least x; x is finite and not negative.
int scale_at_least(float x) {
  uint32_t pattern;
  __builtin_memcpy(&pattern, &x, 4);
  const int64_t byte = static_cast<int64_t>((pattern + 0xfffff) >> 20) - (127 - kScaleBias) * 8;
  return static_cast<int>(byte < 0 ? 0 : byte > kScaleLargest ? kScaleLargest : byte);
}

LOWBIT_INLINE F32 clamp(F32 x, F32 top) { return max(zero_f32(), min(top, x)); }

// Codes of a channel's keys: x = scale * code + least.
template <int bits>
struct KeyCodes {
  static constexpr float kTop = (1 << bits) - 1;
  F32 inverse, scale, least;
  KeyCodes(uint8_t byte, float middle, uint16_t* stored_least) {
    const float step = page_scale(byte);
    uint16_t narrow[16];
    store_fp16(narrow, set1(middle - step * (0.5f * kTop)));
    *stored_least = narrow[0];
    least = load_fp16(narrow);
    scale = set1(step);
    inverse = set1(1.0f / step);
  }
  LOWBIT_INLINE F32 code(F32 x) const { return clamp(round_even(mul(sub(x, least), inverse)), set1(kTop)); }
  LOWBIT_INLINE F32 value(F32 code) const { return fma(code, scale, least); }
};

// Codes of a token's values: x = scale * (2 * code - top).
template <int bits>
struct ValueCodes {
  static constexpr float kTop = (1 << bits) - 1;
  F32 inverse, scale;
  explicit ValueCodes(uint8_t byte) {
    const float step = page_scale(byte);
    scale = set1(step);
    inverse = set1(0.5f / step);
  }
  ValueCodes() = default;
  LOWBIT_INLINE F32 code(F32 x) const {
    return clamp(round_even(fma(x, inverse, set1(0.5f * kTop))), set1(kTop));
  }
  LOWBIT_INLINE F32 value(F32 code) const { return mul(fma(code, set1(2), set1(-kTop)), scale); }
};

template <typename Codes>
LOWBIT_INLINE F32 squared_error(const Codes& codes, F32 x, F32 sum) {
  const F32 error = sub(x, codes.value(codes.code(x)));
  return fma(error, error, sum);
}

// 16 bytes of the codes of 8 / bits groups.
template <int bits, typename F>
LOWBIT_INLINE void store_codes(uint8_t* p, F code_of_part) {
  I32 bytes = add(to_i32(code_of_part(0)), shift_left<bits>(to_i32(code_of_part(1))));
  if (bits == 2) {
    bytes = add(bytes, shift_left<4>(to_i32(code_of_part(2))));
    bytes = add(bytes, shift_left<6>(to_i32(code_of_part(3))));
  }
  store_i8(reinterpret_cast<int8_t*>(p), bytes);
}

// first_key: where the first key of a text is kept, or null.
template <int bits>
void seal_keys(const uint16_t* keys, size_t head_dim, uint16_t* first_key, const KvPage& page) {
  constexpr size_t kRowBytes = 8 * bits, kVectors = kRowBytes / 16;
  for (size_t d = 0; d < head_dim; ++d) {
    F32 x[4], poison = zero_f32();
    for (size_t v = 0; v < 4; ++v) {
      x[v] = load_fp16(keys + (v * head_dim + d) * kKeyLanes);
      poison = fma(x[v], zero_f32(), poison);
    }
    if (first_key) {
      first_key[d] = keys[d * kKeyLanes];
      float lanes[16];
      store(lanes, x[0]);
      lanes[0] = lanes[1];
      x[0] = load(lanes);
    }
    const float low = reduce_min(min(min(x[0], x[1]), min(x[2], x[3])));
    const float high = reduce_max(max(max(x[0], x[1]), max(x[2], x[3])));
    const int largest = scale_at_least((high - low) / KeyCodes<bits>::kTop);
    const float middle = 0.5f * (low + high);
    float least_error = __builtin_inff();
    uint8_t best = 0;
    uint16_t least;
    for (int byte = largest; byte >= 0 && byte > largest - kTriedOfKeys<bits>; --byte) {
      const KeyCodes<bits> codes(static_cast<uint8_t>(byte), middle, &least);
      F32 sum = zero_f32();
      for (size_t v = 0; v < 4; ++v) sum = squared_error(codes, x[v], sum);
      const float error = reduce_add(sum);
      if (error < least_error) least_error = error, best = static_cast<uint8_t>(byte);
    }
    const KeyCodes<bits> codes(best, middle, &least);
    page.key_leasts[d] = least;
    page.key_scales[d] = reduce_add(poison) == 0.0f ? best : kScaleNan;
    for (size_t v = 0; v < kVectors; ++v)
      store_codes<bits>(page.keys + d * kRowBytes + 16 * v,
                        [&](size_t part) { return codes.code(x[v + part * kVectors]); });
  }
}

template <int bits>
void seal_values(const uint16_t* values, size_t stride, const KvPage& page) {
  constexpr size_t kRowBytes = 8 * bits;
  ValueCodes<bits> of_token[kKvPage];
  for (size_t token = 0; token < kKvPage; ++token) {
    const uint16_t* row = values + token * stride;
    Peak peak;
    for (size_t i = 0; i < stride; i += 16) peak.see(load_fp16(row + i));
    const int largest = scale_at_least(peak.close() / ValueCodes<bits>::kTop);
    float least_error = __builtin_inff();
    uint8_t best = 0;
    for (int byte = largest; byte >= 0 && byte > largest - kTriedOfValues<bits>; --byte) {
      const ValueCodes<bits> codes(static_cast<uint8_t>(byte));
      F32 sum = zero_f32();
      for (size_t i = 0; i < stride; i += 16) sum = squared_error(codes, load_fp16(row + i), sum);
      const float error = reduce_add(sum);
      if (error < least_error) least_error = error, best = static_cast<uint8_t>(byte);
    }
    of_token[token] = ValueCodes<bits>(best);
    page.value_scales[token] = reduce_add(peak.poison) == 0.0f ? best : kScaleNan;
  }
  for (size_t row = 0; row < kRowBytes; ++row)
    for (size_t i = 0; i < stride; i += 16)
      store_codes<bits>(page.values + row * stride + i, [&](size_t part) {
        const size_t token = row + part * kRowBytes;
        return of_token[token].code(load_fp16(values + token * stride + i));
      });
}

template <int bits>
void seal(const uint16_t* keys, const uint16_t* values, size_t head_dim, size_t stride, size_t position,
          uint8_t* head) {
  const size_t n = position % kSegment / kKvPage;
  const KvPage place(KvPage::at(head, n, head_dim, stride, bits), head_dim, stride, bits);
  seal_keys<bits>(keys, head_dim, position < kKvPage ? KvPage::first_key(head) : nullptr, place);
  seal_values<bits>(values, stride, place);
}

void seal_page(int bits, const uint16_t* keys, const uint16_t* values, size_t head_dim, size_t stride,
               size_t position, uint8_t* head) {
  if (bits == 4)
    seal<4>(keys, values, head_dim, stride, position, head);
  else
    seal<2>(keys, values, head_dim, stride, position, head);
}

// Numbers of 8 / bits groups that share the bytes at p, in the order of their bits.
template <int bits, typename F>
LOWBIT_INLINE void each_part(const uint8_t* p, F use) {
  const I32 bytes = load_u8_i32(p), mask = set1_i32((1 << bits) - 1);
  use(0, and_(bytes, mask));
  if (bits == 4) {
    use(1, shift_right<4>(bytes));
  } else {
    use(1, and_(shift_right<2>(bytes), mask));
    use(2, and_(shift_right<4>(bytes), mask));
    use(3, shift_right<6>(bytes));
  }
}

// keys [4][head_dim][16] and values [64][stride] of a page.
template <int bits>
void unpack(const KvPage& page, size_t head_dim, size_t stride, float* keys, float* values) {
  constexpr size_t kRowBytes = 8 * bits, kVectors = kRowBytes / 16;
  constexpr int kTop = (1 << bits) - 1;
  for (size_t first = 0; first < head_dim; first += 16) {
    const size_t count = head_dim - first < 16 ? head_dim - first : 16;
    float leasts[16];
    store(leasts, load_fp16(page.key_leasts + first));  // what follows the last are the scales
    for (size_t d = first; d < first + count; ++d) {
      const F32 scale = set1(page_scale(page.key_scales[d])), least = set1(leasts[d - first]);
      for (size_t v = 0; v < kVectors; ++v)
        each_part<bits>(page.keys + d * kRowBytes + 16 * v, [&](size_t part, I32 code) {
          store(keys + ((v + part * kVectors) * head_dim + d) * kKeyLanes, fma(to_f32(code), scale, least));
        });
    }
  }
  for (size_t row = 0; row < kRowBytes; ++row) {
    F32 scale[4];
    for (size_t part = 0; part < 8 / bits; ++part)
      scale[part] = set1(page_scale(page.value_scales[row + part * kRowBytes]));
    for (size_t i = 0; i < stride; i += 16)
      each_part<bits>(page.values + row * stride + i, [&](size_t part, I32 code) {
        store(values + (row + part * kRowBytes) * stride + i,
              mul(to_f32(sub(add(code, code), set1_i32(kTop))), scale[part]));
      });
  }
}

// Puts a key into lane 0 of the first sixteen.
void put_first(const uint16_t* key, size_t head_dim, float* keys) {
  for (size_t first = 0; first < head_dim; first += 16) {
    float lanes[16];
    store(lanes, load_fp16(key + first));  // what follows the last are codes
    for (size_t d = first; d < head_dim && d < first + 16; ++d) keys[d * kKeyLanes] = lanes[d - first];
  }
}

void attend_pages(const AttentionTile& t, int bits, const uint8_t* head, const uint16_t* own_keys,
                  const uint16_t* own_values, size_t segment, const AttentionState& state, float* scratch) {
  clear_state(t, state);
  const size_t own = t.position / kKvPage * kKvPage, end = t.position + (t.rows - 1) / t.group + 1;
  const size_t begin = t.window && t.position + 1 > t.window ? t.position + 1 - t.window : 0;
  uint8_t* codes = const_cast<uint8_t*>(head);  // which are only read
  float* values = scratch + kKvPage * t.head_dim;
  for (size_t first = segment; first < segment + kSegment && first < end; first += kKvPage) {
    if (first + kKvPage <= begin) continue;
    if (first < own) {
      const KvPage page(KvPage::at(codes, (first - segment) / kKvPage, t.head_dim, t.stride, bits),
                        t.head_dim, t.stride, bits);
      if (bits == 4)
        unpack<4>(page, t.head_dim, t.stride, scratch, values);
      else
        unpack<2>(page, t.head_dim, t.stride, scratch, values);
      if (first == 0) put_first(KvPage::first_key(codes), t.head_dim, scratch);
    } else {
      const size_t seen = end - first < kKvPage ? end - first : kKvPage;
      widen(own_keys, (seen + kKeyLanes - 1) / kKeyLanes * kKeyLanes * t.head_dim, scratch);
      widen(own_values, seen * t.stride, values);
    }
    attend_block(t, Block<float>{first, scratch, values, scratch, values}, state);
  }
}
static_assert(kKvPage == kAttentionBlock, "a page is a block");

}  // namespace

void add_page_kernels(DecoderKernels& table) {
  table.seal_page = seal_page;
  table.attend_pages = attend_pages;
}

}  // namespace lowbit::LOWBIT_ISA
