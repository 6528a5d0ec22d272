// Keys and values of one sequence, in 16 or 8 bit.
//
// Positions are grouped in segments of 256. A segment holds every layer and head of its positions, so memory
// is touched in step with the length. Within it, per layer and key-value head:
//
//   16 bit, fp16:
//   keys    [256 / 16][head_dim][16]   sixteen keys side by side: a vector holds one dimension of 16 keys
//   values  [256][value_stride]        head_dim rounded up to 16, padded with zeros
//
//   8 bit, integers with scales, laid out for dot products of four bytes:
//   keys    [256 / 16][head_dim / 4][16][4]        16 keys x 4 channels, plus 128 (the unsigned operand)
//   values  [256 / 64][16][value_stride / 16][16][4]  16 channels x 4 tokens: step s of a block of 64 holds
//                                                  tokens s, s + 16, s + 32, s + 48
//   key_scales     [head_dim / 64][256]   one per key and 64 channels
//   value_logs     [256]   the binary logarithm of the value's scale, and
//   value_inverses [256]   one over that scale
//
// What lies at a position depends on the tokens up to it only, never on how they were fed.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace lowbit {

constexpr size_t kSegment = 256;
constexpr size_t kKeyLanes = 16;
constexpr size_t kKeyGroup = 64;  // channels of a query or key that share one scale

struct KvShape {
  size_t n_layers = 0;
  size_t n_kv_heads = 0;
  size_t head_dim = 0;
  int bits = 16;
  size_t value_stride() const { return (head_dim + 15) / 16 * 16; }
  size_t key_groups() const { return (head_dim + kKeyGroup - 1) / kKeyGroup; }
  // Bytes of one position in one head.
  size_t position_bytes() const {
    const size_t numbers = head_dim + value_stride();
    return bits == 16 ? numbers * sizeof(uint16_t) : numbers + (key_groups() + 2) * sizeof(float);
  }
  size_t head_bytes() const { return kSegment * position_bytes(); }
  size_t segment_bytes() const { return n_layers * n_kv_heads * head_bytes(); }
  bool operator==(const KvShape& o) const {
    return n_layers == o.n_layers && n_kv_heads == o.n_kv_heads && head_dim == o.head_dim && bits == o.bits;
  }
};

// One head of a segment in 8 bit.
struct KvIntegers {
  uint8_t* keys;
  int8_t* values;
  float *key_scales, *value_logs, *value_inverses;
};

class KvCache {
 public:
  // Reserves address space for `capacity` positions; memory is taken as positions are written.
  // Throws std::invalid_argument or std::runtime_error.
  KvCache(const KvShape& shape, size_t capacity);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  const KvShape& shape() const { return shape_; }
  size_t length() const { return length_; }
  size_t capacity() const { return capacity_; }
  // Bytes of all `capacity` positions once they are written.
  size_t bytes() const;
  // Forgets the positions from `length` on. Throws if that is beyond the present length or a step runs.
  void truncate(size_t length);

  uint16_t* keys(size_t segment, size_t layer, size_t head) const {
    return reinterpret_cast<uint16_t*>(at(segment, layer, head));
  }
  uint16_t* values(size_t segment, size_t layer, size_t head) const {
    return keys(segment, layer, head) + kSegment * shape_.head_dim;
  }
  KvIntegers integers(size_t segment, size_t layer, size_t head) const {
    KvIntegers k;
    k.keys = at(segment, layer, head);
    k.values = reinterpret_cast<int8_t*>(k.keys + kSegment * shape_.head_dim);
    k.key_scales = reinterpret_cast<float*>(k.values + kSegment * shape_.value_stride());
    k.value_logs = k.key_scales + kSegment * shape_.key_groups();
    k.value_inverses = k.value_logs + kSegment;
    return k;
  }

  // A step owns the cache between these; false if another step has it.
  bool acquire() { return !busy_.exchange(true); }
  void release() { busy_.store(false); }
  // The owning step says how many positions are complete.
  void set_length(size_t length) { length_ = length; }

 private:
  uint8_t* at(size_t segment, size_t layer, size_t head) const {
    return data_ + segment * shape_.segment_bytes() +
           (layer * shape_.n_kv_heads + head) * shape_.head_bytes();
  }

  KvShape shape_;
  size_t capacity_;
  size_t reserved_bytes_ = 0;
  uint8_t* data_ = nullptr;
  std::atomic<size_t> length_{0};
  std::atomic<bool> busy_{false};
};

}  // namespace lowbit
