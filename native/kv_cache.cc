// Address space for keys and values. See kv_cache.h.
#include "kv_cache.h"

#include <sys/mman.h>

#include <stdexcept>
#include <string>

namespace lowbit {

KvCache::KvCache(const KvShape& shape, size_t capacity) : shape_(shape), capacity_(capacity) {
  constexpr size_t kLimit = size_t{1} << 24;  // positions are kept exactly in float32 (rotary angles)
  if (capacity < 1 || capacity > kLimit)
    throw std::invalid_argument("KvCache: capacity=" + std::to_string(capacity) + " must be 1 to " +
                                std::to_string(kLimit) + " positions");
  const size_t segments = (capacity + kSegment - 1) / kSegment;
  const size_t segment_bytes = shape.segment_bytes();
  if (segments > (size_t{1} << 46) / segment_bytes)
    throw std::invalid_argument("KvCache: capacity=" + std::to_string(capacity) +
                                " needs more than 64 TiB; " + "ask for fewer positions");
  reserved_bytes_ = segments * segment_bytes;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
  flags |= MAP_NORESERVE;
#endif
  void* memory = mmap(nullptr, reserved_bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED)
    throw std::runtime_error("KvCache: the system refused " + std::to_string(reserved_bytes_) +
                             " bytes of address space for capacity=" + std::to_string(capacity) +
                             "; ask for fewer positions");
  data_ = static_cast<uint8_t*>(memory);
}

KvCache::~KvCache() { munmap(data_, reserved_bytes_); }

size_t KvCache::bytes() const {
  return capacity_ * shape_.n_layers * shape_.n_kv_heads * shape_.position_bytes();
}

void KvCache::truncate(size_t length) {
  if (!acquire())
    throw std::runtime_error("KvCache.truncate: a step is using this cache; wait until it returns");
  const size_t present = length_;
  if (length <= present) length_ = length;
  release();
  if (length > present)
    throw std::invalid_argument("KvCache.truncate: length=" + std::to_string(length) +
                                " is beyond the present length=" + std::to_string(present) +
                                "; only append tokens to grow");
}

}  // namespace lowbit
