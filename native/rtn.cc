#include "rtn.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "dispatch.h"
#include "layout.h"
#include "team.h"

namespace lowbit {

#define LOWBIT_DECLARE(isa)                                          \
  namespace isa {                                                    \
  void rtn_tile(const RtnJob&, size_t block, size_t tile, uint8_t*); \
  }
LOWBIT_EVERY_ISA(LOWBIT_DECLARE)

namespace {

RtnTile tile_kernel() {
#define LOWBIT_CASE(isa) \
  case Isa::isa:         \
    return isa::rtn_tile;
  switch (active_isa()) {
    LOWBIT_EVERY_ISA(LOWBIT_CASE)
    default:
      return scalar::rtn_tile;
  }
}

// For each bucket of numbers with equal top bits: how many boundaries lie below its smallest number.
void build_lookup(LevelTable& table) {
  table.lookup.resize(kLookupSize);
  const float* end = table.boundaries + table.count - 1;
  for (uint32_t key = 0; key < kLookupSize; ++key) {
    const bool negative = key >= kLookupSize / 2;
    // Among negative numbers the smallest has the largest magnitude.
    const uint32_t pattern = (key << kLookupShift) | (negative ? (1u << kLookupShift) - 1 : 0);
    float smallest;
    std::memcpy(&smallest, &pattern, 4);
    const bool finite = (pattern & 0x7f800000u) != 0x7f800000u;
    const size_t below =
        !finite ? (negative ? 0 : table.count - 1)
                : static_cast<size_t>(std::lower_bound(table.boundaries, end, smallest) - table.boundaries);
    table.lookup[key] = static_cast<uint8_t>(below);
  }
}

constexpr size_t kScanChunk = 1 << 16;

}  // namespace

size_t rtn_scratch_bytes(const RtnJob& job) {
  const size_t padded = round_up(job.columns, job.base3 ? kBase3Inputs : kChunk);
  const size_t floats = 2 * kTileRows * job.group_size * job.together + rtn_group_floats(job);
  return floats * sizeof(float) + kTileRows * padded * job.planes;
}

RtnSums round_to_nearest(RtnJob& job) {
  for (LevelTable& table : job.tables)
    if (!table.linear && table.count > kChainLevels) build_lookup(table);
  const RtnTile tile = tile_kernel();
  const size_t blocks = round_up(job.rows, kBlockRows) / kBlockRows;
  std::atomic<size_t> next{0};
  team()->run([&](const Member&) {
    const size_t bytes = round_up(rtn_scratch_bytes(job), 64);
    std::unique_ptr<uint8_t, void (*)(void*)> scratch(static_cast<uint8_t*>(std::aligned_alloc(64, bytes)),
                                                      std::free);
    for (size_t block = next++; block < blocks; block = next++)
      for (size_t t = 0; t < 2; ++t)
        if (block * kBlockRows + t * kTileRows < job.rows) tile(job, block, t, scratch.get());
  });
  RtnSums sums = {0, 0};
  for (size_t block = 0; block < blocks; ++block) {  // in order, so that threads do not matter
    sums.error += job.errors[block];
    sums.square += job.squares[block];
  }
  return sums;
}

uint32_t largest_magnitude_bits(const float* x, size_t n) {
  std::atomic<int32_t> largest{0};
  std::atomic<size_t> next{0};
  team()->run([&](const Member&) {
    int32_t mine = 0;
    for (size_t begin = next.fetch_add(kScanChunk); begin < n; begin = next.fetch_add(kScanChunk)) {
      const size_t end = std::min(n, begin + kScanChunk);
      for (size_t i = begin; i < end; ++i) {
        int32_t magnitude;
        std::memcpy(&magnitude, x + i, 4);
        magnitude &= 0x7fffffff;  // magnitudes order like their bits
        mine = magnitude > mine ? magnitude : mine;
      }
    }
    int32_t seen = largest.load();
    while (mine > seen && !largest.compare_exchange_weak(seen, mine)) {
    }
  });
  return static_cast<uint32_t>(largest.load());
}

}  // namespace lowbit
