// Which blocks a sequence holds. See kv_cache.h.
#include "kv_cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace lowbit {
namespace {

size_t blocks_for(size_t positions) { return (positions + kSegment - 1) / kSegment; }

size_t checked_capacity(size_t capacity) {
  constexpr size_t kLimit = size_t{1} << 24;  // positions are kept exactly in float32 (rotary angles)
  if (capacity < 1 || capacity > kLimit)
    throw std::invalid_argument("KvCache: capacity=" + std::to_string(capacity) + " must be 1 to " +
                                std::to_string(kLimit) + " positions");
  return capacity;
}

// Owns the cache for one call.
class Use {
 public:
  Use(KvCache& cache, const char* call) : cache_(cache) {
    if (!cache.acquire())
      throw std::runtime_error(std::string("KvCache.") + call +
                               ": another thread is using this cache; wait until it returns");
  }
  ~Use() { cache_.release(); }

 private:
  KvCache& cache_;
};

}  // namespace

KvCache::KvCache(const KvShape& shape, size_t capacity)
    : shape_(shape),
      capacity_(checked_capacity(capacity)),
      pool_(std::make_shared<KvPool>(shape, blocks_for(capacity))),
      own_pool_(true) {}

KvCache::KvCache(std::shared_ptr<KvPool> pool, size_t capacity)
    : shape_(pool->shape()),
      capacity_(checked_capacity(capacity)),
      pool_(std::move(pool)),
      own_pool_(false) {}

KvCache::~KvCache() {
  keep_pages({});
  drop_from(0);
}

size_t KvCache::bytes() const {
  const size_t page = shape_.page_positions();
  return (capacity_ + page - 1) / page * page * shape_.segment_bytes() / kSegment;
}

void KvCache::drop_from(size_t block) {
  while (blocks_.size() > block) {
    pool_->drop(blocks_.back());
    blocks_.pop_back();
  }
}

bool KvCache::has_room(size_t length) const {
  const size_t present = length_;
  if (blocks_.size() < blocks_for(length)) return false;
  return length <= present || present % kSegment == 0 || !pool_->shared(blocks_[present / kSegment]);
}

bool KvCache::take_room(size_t length) {
  if (has_room(length)) return true;
  const size_t present = length_, last = present / kSegment, needed = blocks_for(length);
  const bool copies = length > present && present % kSegment && pool_->shared(blocks_[last]);
  const size_t added = needed > blocks_.size() ? needed - blocks_.size() : 0;
  std::vector<uint32_t> fresh;
  if (!pool_->take(added + copies, &fresh)) return false;
  if (copies) {
    std::memcpy(pool_->data(fresh.back()), pool_->data(blocks_[last]), shape_.segment_bytes());
    pool_->drop(blocks_[last]);
    blocks_[last] = fresh.back();
    fresh.pop_back();
  }
  blocks_.insert(blocks_.end(), fresh.begin(), fresh.end());
  return true;
}

bool KvCache::prepare(size_t length) { return own_pool_ ? take_room(length) : has_room(length); }

bool KvCache::reserve(size_t length) {
  const Use use(*this, "reserve");
  if (length > capacity_)
    throw std::invalid_argument("KvCache.reserve: length=" + std::to_string(length) + " is beyond capacity=" +
                                std::to_string(capacity_) + "; make a cache with a larger one");
  return take_room(length);
}

std::vector<KvBlock> KvCache::hold() {
  const Use use(*this, "blocks");
  const size_t length = length_ - length_ % shape_.page_positions();
  std::vector<KvBlock> held;
  for (size_t first = 0; first < length; first += kSegment)
    held.emplace_back(pool_, blocks_[first / kSegment], std::min(kSegment, length - first));
  return held;
}

bool KvCache::adopt(const std::vector<const KvBlock*>& blocks, size_t length) {
  const Use use(*this, "adopt");
  const std::string call = "KvCache.adopt: ";
  if (length_ != 0)
    throw std::invalid_argument(call + "the cache has " + std::to_string(length_) +
                                " positions; clear it first");
  if (length > capacity_)
    throw std::invalid_argument(call + "length=" + std::to_string(length) +
                                " is beyond capacity=" + std::to_string(capacity_));
  if (blocks.size() < blocks_for(length))
    throw std::invalid_argument(call + "length=" + std::to_string(length) + " needs " +
                                std::to_string(blocks_for(length)) + " blocks, got " +
                                std::to_string(blocks.size()));
  if (length % shape_.page_positions())
    throw std::invalid_argument(call + "length=" + std::to_string(length) + " must be a multiple of " +
                                std::to_string(kKvPage) + " with " + std::to_string(shape_.bits) +
                                "-bit keys and values");
  for (size_t i = 0; i < blocks_for(length); ++i) {
    const size_t wanted = std::min(kSegment, length - i * kSegment);
    if (blocks[i]->pool() != pool_)
      throw std::invalid_argument(call + "blocks[" + std::to_string(i) +
                                  "] is of another pool; share within one pool");
    if (blocks[i]->positions() < wanted)
      throw std::invalid_argument(
          call + "blocks[" + std::to_string(i) + "] holds " + std::to_string(blocks[i]->positions()) +
          " positions, length=" + std::to_string(length) + " needs " + std::to_string(wanted) + " of it");
  }
  const size_t whole = length / kSegment;
  std::vector<uint32_t> table;
  if (length % kSegment) {
    if (!pool_->take(1, &table)) return false;
    std::memcpy(pool_->data(table[0]), pool_->data(blocks[whole]->index()), shape_.segment_bytes());
  }
  drop_from(0);
  for (size_t i = 0; i < whole; ++i) {
    pool_->share(blocks[i]->index());
    blocks_.push_back(blocks[i]->index());
  }
  blocks_.insert(blocks_.end(), table.begin(), table.end());
  set_length(length);
  return true;
}

size_t KvCache::truncate(size_t length) {
  const Use use(*this, "truncate");
  if (length > length_)
    throw std::invalid_argument("KvCache.truncate: length=" + std::to_string(length) +
                                " is beyond the present length=" + std::to_string(length_) +
                                "; only append tokens to grow");
  // A page of codes alone can only be kept whole.
  if (shape_.paged() && !holds(length / kKvPage)) length -= length % kKvPage;
  set_length(length);
  drop_from(blocks_for(length));
  return length;
}

void KvCache::clear() {
  const Use use(*this, "clear");
  set_length(0);
  drop_from(0);
}

bool KvCache::holds(size_t page) const {
  return std::any_of(held_.begin(), held_.end(), [page](const HeldPage& held) { return held.page == page; });
}

// Gives up all other pages and takes slots for those not held yet.
void KvCache::keep_pages(const std::vector<size_t>& pages) {
  std::vector<HeldPage> kept;
  for (const HeldPage& held : held_) {
    if (std::find(pages.begin(), pages.end(), held.page) != pages.end())
      kept.push_back(held);
    else
      pool_->drop_slot(held.slot);
  }
  held_.swap(kept);
  for (const size_t page : pages)
    if (!holds(page)) held_.push_back({page, pool_->take_slot()});
}

void KvCache::hold_pages(size_t begin, size_t end, size_t least) {
  // The page that is not complete now stays: a step that fails leaves the sequence as it is.
  std::vector<size_t> pages;
  for (const size_t length : {length_.load(), begin})
    if (length % kKvPage) pages.push_back(length / kKvPage);
  const size_t last = (end - 1) / kKvPage;
  for (size_t page = std::min(least / kKvPage, last); page <= last; ++page) pages.push_back(page);
  keep_pages(pages);
}

void KvCache::set_length(size_t length) {
  length_ = length;
  if (length > 0 && holds((length - 1) / kKvPage))
    keep_pages({(length - 1) / kKvPage});
  else
    keep_pages({});
}

}  // namespace lowbit
