// Memory for keys and values: blocks of 256 positions, taken and shared by the caches of many sequences.
//
// A block holds every layer and head of its positions. Within it, per layer and key-value head:
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
//   4 and 2 bit: the first key and pages of 64 positions, see kv_pages.h. The page that a sequence writes at
//   present is not in its block yet but, in 16 bit, in a slot: keys [64 / 16][head_dim][16] and values
//   [64][value_stride] of every layer and head.
//
// A block with more than one holder is never written again. Every call may come from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kv_pages.h"

namespace lowbit {

constexpr size_t kSegment = 256;  // positions of a block
constexpr size_t kKeyLanes = 16;
constexpr size_t kKeyGroup = 64;  // channels of a query or key that share one scale

struct KvShape {
  size_t n_layers = 0;
  size_t n_kv_heads = 0;
  size_t head_dim = 0;
  int bits = 16;
  size_t value_stride() const { return (head_dim + 15) / 16 * 16; }
  size_t key_groups() const { return (head_dim + kKeyGroup - 1) / kKeyGroup; }
  // Lengths that a cache can be cut to, or begin with, are multiples of this.
  size_t page_positions() const { return paged() ? kKvPage : 1; }
  bool paged() const { return bits < 8; }
  // Bytes of one head of a block, and of all.
  size_t head_bytes() const {
    const size_t numbers = head_dim + value_stride();
    if (paged())
      return head_dim * sizeof(uint16_t) + kSegment / kKvPage * KvPage::bytes(head_dim, value_stride(), bits);
    return kSegment *
           (bits == 16 ? numbers * sizeof(uint16_t) : numbers + (key_groups() + 2) * sizeof(float));
  }
  size_t segment_bytes() const { return n_layers * n_kv_heads * head_bytes(); }
  // Numbers of one head of a slot, and bytes of all.
  size_t slot_numbers() const { return kKvPage * (head_dim + value_stride()); }
  size_t slot_bytes() const {
    return paged() ? n_layers * n_kv_heads * slot_numbers() * sizeof(uint16_t) : 0;
  }
  bool operator==(const KvShape& o) const {
    return n_layers == o.n_layers && n_kv_heads == o.n_kv_heads && head_dim == o.head_dim && bits == o.bits;
  }
};

class KvPool {
 public:
  // Reserves address space for `blocks` blocks; memory is taken as positions are written.
  // Throws std::invalid_argument or std::runtime_error.
  KvPool(const KvShape& shape, size_t blocks);
  ~KvPool();
  KvPool(const KvPool&) = delete;
  KvPool& operator=(const KvPool&) = delete;

  const KvShape& shape() const { return shape_; }
  size_t blocks() const { return holders_.size(); }
  size_t block_bytes() const { return block_bytes_; }
  size_t free_blocks() const;
  uint8_t* data(uint32_t block) const { return data_ + block * block_bytes_; }

  // Slots of 16-bit pages. There are enough for every sequence that holds a block of its own.
  static constexpr size_t kSlotsOfSequence = 4;
  size_t slot_bytes() const { return slot_bytes_; }
  uint16_t* slot(uint32_t slot) const { return reinterpret_cast<uint16_t*>(slots_ + slot * slot_bytes_); }
  uint32_t take_slot();
  void drop_slot(uint32_t slot);

  // Appends `count` blocks that nobody else holds to `out`: all of them, or none and false.
  bool take(size_t count, std::vector<uint32_t>* out);
  void share(uint32_t block);  // one holder more
  void drop(uint32_t block);   // one less; without holders it is free
  bool shared(uint32_t block) const;
  // Gives the memory of free blocks and slots back to the system.
  void trim();

 private:
  const KvShape shape_;
  size_t block_bytes_, slot_bytes_;  // whole pages of the system
  uint8_t *data_ = nullptr, *slots_ = nullptr;
  mutable std::mutex mutex_;
  std::vector<uint32_t> holders_;  // [blocks]
  std::vector<uint32_t> free_;     // the last is taken next
  std::vector<uint32_t> free_slots_;
};

// Holds one block, whose first `positions` positions are written.
class KvBlock {
 public:
  KvBlock(std::shared_ptr<KvPool> pool, uint32_t index, size_t positions)
      : pool_(std::move(pool)), index_(index), positions_(positions) {
    pool_->share(index_);
  }
  KvBlock(KvBlock&& other) noexcept = default;
  KvBlock& operator=(KvBlock&&) = delete;
  ~KvBlock() {
    if (pool_) pool_->drop(index_);
  }

  const std::shared_ptr<KvPool>& pool() const { return pool_; }
  uint32_t index() const { return index_; }
  size_t positions() const { return positions_; }

 private:
  std::shared_ptr<KvPool> pool_;
  uint32_t index_;
  size_t positions_;
};

}  // namespace lowbit
