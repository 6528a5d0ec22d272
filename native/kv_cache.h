// Keys and values of one sequence in 16 bit.
//
// Positions are grouped in segments of 256. A segment holds every layer and head of its positions, so memory
// is touched in step with the length. Within it, per layer and key-value head:
//   keys    [256 / 16][head_dim][16]  sixteen keys side by side: a vector holds one dimension of 16 keys
//   values  [256][value_stride]       head_dim rounded up to 16, padded with zeros
// What lies at a position depends on the tokens up to it only, never on how they were fed.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace lowbit {

constexpr size_t kSegment = 256;
constexpr size_t kKeyLanes = 16;

struct KvShape {
  size_t n_layers = 0;
  size_t n_kv_heads = 0;
  size_t head_dim = 0;
  size_t value_stride() const { return (head_dim + 15) / 16 * 16; }
  size_t head_elements() const { return kSegment * (head_dim + value_stride()); }
  size_t segment_elements() const { return n_layers * n_kv_heads * head_elements(); }
  bool operator==(const KvShape& o) const {
    return n_layers == o.n_layers && n_kv_heads == o.n_kv_heads && head_dim == o.head_dim;
  }
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
    return data_ + segment * shape_.segment_elements() +
           (layer * shape_.n_kv_heads + head) * shape_.head_elements();
  }
  uint16_t* values(size_t segment, size_t layer, size_t head) const {
    return keys(segment, layer, head) + kSegment * shape_.head_dim;
  }

  // A step owns the cache between these; false if another step has it.
  bool acquire() { return !busy_.exchange(true); }
  void release() { busy_.store(false); }
  // The owning step says how many positions are complete.
  void set_length(size_t length) { length_ = length; }

 private:
  KvShape shape_;
  size_t capacity_;
  size_t reserved_bytes_ = 0;
  uint16_t* data_ = nullptr;
  std::atomic<size_t> length_{0};
  std::atomic<bool> busy_{false};
};

}  // namespace lowbit
