// Order of a product by lookups: tables of a few tokens and inputs meet all blocks, then the next inputs.
#include "bit_products.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"

namespace lowbit {

#define LOWBIT_DECLARE(isa)      \
  namespace isa {                \
  BitKernels make_bit_kernels(); \
  }
LOWBIT_EVERY_ISA(LOWBIT_DECLARE)

static BitKernels make() {
#define LOWBIT_CASE(isa) \
  case Isa::isa:         \
    return isa::make_bit_kernels();
  switch (active_isa()) {
    LOWBIT_EVERY_ISA(LOWBIT_CASE)
    default:
      return scalar::make_bit_kernels();
  }
}

static const BitKernels& bit_kernels() {
  static const BitKernels table = make();
  return table;
}

namespace {

// Fewer rows do not pay for the tables: 16 inputs of a token take 5 cycles, and save 1.2 for each 16 rows.
constexpr size_t kLeastBlocks = 8;
// Two tokens take 0.55 of the time of codes that are decoded in registers for both.
constexpr size_t kLeastTokens = 2;

// Groups of whole segments that no slice cuts, and levels whose sums of bytes fit a byte's factor.
bool has_bits(const CodeTerm& t, size_t in_features) {
  return t.bits == 1 && !t.base3 && t.map == Map::linear && t.step >= 1 && t.step <= 3 && !t.zero_points &&
         !t.offsets && !t.selectors && !t.multipliers && t.group_size % kActivationGroup == 0 &&
         kBitSlice % t.group_size == 0 && t.groups * t.group_size == in_features;
}

}  // namespace

bool takes_bits(const Matrix& m, size_t blocks, size_t tokens, int limbs) {
  return bit_kernels().multiply && limbs == 1 && tokens >= kLeastTokens && blocks >= kLeastBlocks &&
         !m.codes.empty() && m.floats.empty() &&
         std::all_of(m.codes.begin(), m.codes.end(),
                     [&](const CodeTerm& t) { return has_bits(t, m.in_features); });
}

void bit_products(const Product& p, size_t block, size_t stop, const Activations& a, MatmulScratch& scratch) {
  const BitKernels& kernels = bit_kernels();
  const Matrix& m = *p.matrix;
  constexpr size_t kBlock = kBitTokens * kBlockRows;  // floats of a block's results
  uint8_t* const memory =
      scratch.get(kBitTokens * sizeof(BitTable) + (stop - block) * kBlock * sizeof(float));
  BitTable* const tables = reinterpret_cast<BitTable*>(memory);
  float* const acc = reinterpret_cast<float*>(tables + kBitTokens);
  for (size_t first = 0; first < a.tokens; first += kBitTokens) {
    const size_t count = std::min(kBitTokens, a.tokens - first);
    std::memset(acc, 0, (stop - block) * kBlock * sizeof(float));
    for (const CodeTerm& t : m.codes)
      for (size_t k = 0; k < m.in_features; k += kBitSlice) {
        const size_t end = std::min(k + kBitSlice, m.in_features);
        for (size_t c = 0; c < count; ++c) kernels.make_table(t, a, first + c, k, end, tables + c);
        for (size_t b = block; b < stop; ++b)
          kernels.multiply(t, b, m.chunks(), k, end, tables, count, acc + (b - block) * kBlock);
      }
    for (size_t b = block; b < stop; ++b) {
      const size_t rows = std::min(kBlockRows, m.out_features - b * kBlockRows);
      for (size_t c = 0; c < count; ++c)
        std::memcpy(p.out + (first + c) * p.stride + b * kBlockRows,
                    acc + (b - block) * kBlock + c * kBlockRows, rows * sizeof(float));
    }
  }
}

}  // namespace lowbit
