#include "gguf_fit.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "dispatch.h"
#include "matrix.h"
#include "team.h"

namespace lowbit {

#define LOWBIT_DECLARE(isa)                                                                                 \
  namespace isa {                                                                                           \
  void fit_tile(int number, const float* weights, size_t live, uint8_t* out, float* scratch);               \
  void rows_of_block(const void* packed, size_t bytes, bool bf16, size_t live, size_t columns, float* out); \
  }
LOWBIT_EVERY_ISA(LOWBIT_DECLARE)

namespace {

constexpr FitType kFits[] = {{3, 32, 20}, {12, 256, 144}, {14, 256, 210}};

FitTile tile_kernel() {
#define LOWBIT_CASE(isa) \
  case Isa::isa:         \
    return isa::fit_tile;
  switch (active_isa()) {
    LOWBIT_EVERY_ISA(LOWBIT_CASE)
    default:
      return scalar::fit_tile;
  }
#undef LOWBIT_CASE
}

using BlockRows = void (*)(const void*, size_t, bool, size_t, size_t, float*);

BlockRows rows_kernel() {
#define LOWBIT_CASE(isa) \
  case Isa::isa:         \
    return isa::rows_of_block;
  switch (active_isa()) {
    LOWBIT_EVERY_ISA(LOWBIT_CASE)
    default:
      return scalar::rows_of_block;
  }
#undef LOWBIT_CASE
}

}  // namespace

const FitType* find_fit_type(int number) {
  for (const FitType& type : kFits)
    if (type.number == number) return &type;
  return nullptr;
}

void fit_blocks(const FitType& type, const float* weights, size_t blocks, uint8_t* out) {
  const FitTile tile = tile_kernel();
  std::atomic<size_t> next{0};
  team()->run([&](const Member&) {
    std::unique_ptr<float, void (*)(void*)> scratch(
        static_cast<float*>(std::aligned_alloc(64, kFitScratch * sizeof(float))), std::free);
    for (size_t first = next.fetch_add(16); first < blocks; first = next.fetch_add(16))
      tile(type.number, weights + first * type.weights, std::min<size_t>(16, blocks - first),
           out + first * type.bytes, scratch.get());
  });
}

void float_rows(const void* packed, size_t bytes, bool bf16, size_t first, size_t count, size_t columns,
                float* out) {
  const BlockRows rows = rows_kernel();
  const size_t blocks = round_up(count, kBlockRows) / kBlockRows;
  team()->run([&](const Member& member) {
    size_t begin, end;
    member.share(blocks, &begin, &end);
    for (size_t block = begin; block < end; ++block) {
      const size_t done = block * kBlockRows;
      rows(static_cast<const uint8_t*>(packed) + (first + done) * columns * bytes, bytes, bf16,
           std::min(kBlockRows, count - done), columns, out + done * columns);
    }
  });
}

}  // namespace lowbit
