// Keys and values of one sequence: a table of blocks of 256 positions, see kv_pool.h for what lies in them.
//
// What lies at a position depends on the tokens up to it only, never on how they were fed.
//
// With 4 and 2 bits a query sees complete earlier pages as codes and its own page in 16 bit: that too depends
// on positions only. Between steps a sequence keeps the page of its last position in 16 bit; a step holds as
// many pages as it may end in.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "kv_pool.h"

namespace lowbit {

// One head of a segment in 8 bit.
struct KvIntegers {
  uint8_t* keys;
  int8_t* values;
  float *key_scales, *value_logs, *value_inverses;
};

// Calls from two threads at once raise std::runtime_error in one of them.
class KvCache {
 public:
  // A cache with memory of its own: address space for `capacity` positions; blocks are taken as steps need
  // them. Throws std::invalid_argument or std::runtime_error.
  KvCache(const KvShape& shape, size_t capacity);
  // A cache that takes its blocks from `pool`, in reserve() and adopt() only.
  KvCache(std::shared_ptr<KvPool> pool, size_t capacity);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  const KvShape& shape() const { return shape_; }
  size_t length() const { return length_; }
  size_t capacity() const { return capacity_; }
  // Bytes of all `capacity` positions once they are written, 16-bit pages apart: slot_bytes() of the pool.
  size_t bytes() const;
  const KvPool& pool() const { return *pool_; }

  // Blocks for positions below `length`, ready to be written: a last block that others hold too is copied.
  // False, and nothing changed, if the pool has too few.
  bool reserve(size_t length);
  // Holds on the blocks below the present length (of complete pages). Whoever writes on in the last one
  // copies it first.
  std::vector<KvBlock> hold();
  // An empty cache begins with the first `length` positions of `blocks`: whole blocks are shared, a partial
  // last one is copied. `length` is of whole pages. False, and nothing changed, if the pool lacks the block.
  bool adopt(const std::vector<const KvBlock*>& blocks, size_t length);
  // Forgets the positions from `length` on and gives the blocks beyond back. Returns the length kept: with 4
  // and 2 bits that is where a page begins, unless `length` lies in the page of the last position.
  size_t truncate(size_t length);
  // Forgets all and gives every block back.
  void clear();

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
  // 4 and 2 bit: the first key and the pages, see KvPage.
  uint8_t* coded(size_t segment, size_t layer, size_t head) const { return at(segment, layer, head); }
  // Where a 16-bit page lies that the sequence holds; null if it does not.
  uint16_t* held_page(size_t page, size_t layer, size_t head) const {
    for (const HeldPage& held : held_)
      if (held.page == page)
        return pool_->slot(held.slot) + (layer * shape_.n_kv_heads + head) * shape_.slot_numbers();
    return nullptr;
  }

  // Numbers (of 16 bit) from a head's place in this segment to the same in the next; 0 in the last.
  ptrdiff_t step_to_next(size_t segment) const {
    if (segment + 1 >= blocks_.size()) return 0;
    return (pool_->data(blocks_[segment + 1]) - pool_->data(blocks_[segment])) / 2;
  }

  // A step owns the cache between these; false if another step has it.
  bool acquire() { return !busy_.exchange(true); }
  void release() { busy_.store(false); }
  // The owning step may write positions from the present length up to `length`. A cache with memory of its
  // own takes the blocks for that; any other must have reserved them.
  bool prepare(size_t length);
  // Of 4 and 2 bits: positions [begin, end) follow in one pass of the step, which may end at any length from
  // `least` on. Holds the pages that this and later passes continue or end in.
  void hold_pages(size_t begin, size_t end, size_t least);
  // The owning step says how many positions are complete.
  void set_length(size_t length);

 private:
  bool take_room(size_t length);
  bool has_room(size_t length) const;
  void drop_from(size_t block);
  bool holds(size_t page) const;
  void keep_pages(const std::vector<size_t>& pages);
  uint8_t* at(size_t segment, size_t layer, size_t head) const {
    return pool_->data(blocks_[segment]) + (layer * shape_.n_kv_heads + head) * shape_.head_bytes();
  }

  const KvShape shape_;
  const size_t capacity_;
  const std::shared_ptr<KvPool> pool_;
  const bool own_pool_;
  struct HeldPage {
    size_t page;
    uint32_t slot;
  };
  std::vector<uint32_t> blocks_;
  std::vector<HeldPage> held_;
  std::atomic<size_t> length_{0};
  std::atomic<bool> busy_{false};
};

}  // namespace lowbit
