// Address space for keys and values, and who holds which block. See kv_pool.h.
#include "kv_pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

namespace lowbit {

namespace {

uint8_t* reserve_space(size_t bytes, size_t blocks) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
  flags |= MAP_NORESERVE;
#endif
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED)
    throw std::runtime_error("KvPool: the system refused " + std::to_string(bytes) +
                             " bytes of address space for " + std::to_string(blocks) + " blocks of " +
                             std::to_string(kSegment) + " positions; ask for fewer");
  return static_cast<uint8_t*>(memory);
}

// Indices so that 0 is taken first.
void fill_free(size_t count, std::vector<uint32_t>* free) {
  free->reserve(count);
  for (size_t i = count; i-- > 0;) free->push_back(static_cast<uint32_t>(i));
}

}  // namespace

KvPool::KvPool(const KvShape& shape, size_t blocks) : shape_(shape) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  block_bytes_ = (shape.segment_bytes() + page - 1) / page * page;
  slot_bytes_ = (shape.slot_bytes() + page - 1) / page * page;
  const size_t bytes = block_bytes_ + kSlotsOfSequence * slot_bytes_;
  if (blocks < 1 || blocks > (size_t{1} << 46) / bytes)
    throw std::invalid_argument("KvPool: blocks=" + std::to_string(blocks) + " of " +
                                std::to_string(block_bytes_) + " bytes each must be 1 to 64 TiB in all");
  fill_free(blocks, &free_);
  if (slot_bytes_) fill_free(blocks * kSlotsOfSequence, &free_slots_);
  holders_.assign(blocks, 0);
  data_ = reserve_space(blocks * bytes, blocks);
  slots_ = data_ + blocks * block_bytes_;
}

KvPool::~KvPool() { munmap(data_, holders_.size() * (block_bytes_ + kSlotsOfSequence * slot_bytes_)); }

size_t KvPool::free_blocks() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return free_.size();
}

bool KvPool::take(size_t count, std::vector<uint32_t>* out) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (count > free_.size()) return false;
  out->reserve(out->size() + count);
  for (size_t i = 0; i < count; ++i) {
    out->push_back(free_.back());
    holders_[free_.back()] = 1;
    free_.pop_back();
  }
  return true;
}

void KvPool::share(uint32_t block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++holders_[block];
}

void KvPool::drop(uint32_t block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (--holders_[block] == 0) free_.push_back(block);  // has room for all
}

bool KvPool::shared(uint32_t block) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return holders_[block] > 1;
}

uint32_t KvPool::take_slot() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const uint32_t slot = free_slots_.back();
  free_slots_.pop_back();
  return slot;
}

void KvPool::drop_slot(uint32_t slot) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_slots_.push_back(slot);
}

void KvPool::trim() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const uint32_t index : free_slots_) madvise(slot(index), slot_bytes_, MADV_DONTNEED);
  for (const uint32_t block : free_) madvise(data(block), block_bytes_, MADV_DONTNEED);
}

}  // namespace lowbit
