// Activations in the forms that the kernels read: their memory, and rounding to integers.
#include <cstring>
#include <vector>

#include "matmul.h"
#include "matmul_kernels.h"

namespace lowbit {
namespace {

constexpr size_t kAlign = 64;

uint8_t* align(uint8_t* p) {
  return reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(p), kAlign));
}

}  // namespace

Activations ActivationBuffer::prepare(size_t tokens, size_t in_features, int limbs, const float* values) {
  Activations a;
  a.tokens = tokens;
  a.in_features = in_features;
  a.padded = round_up(in_features, kChunk);
  a.limbs = limbs;
  a.groups = round_up(in_features, kActivationGroup) / kActivationGroup;
  a.values = values;
  a.value_stride = in_features;
  const size_t codes = round_up(tokens * a.padded, kAlign);
  const size_t scales = round_up(tokens * a.groups * sizeof(float), kAlign);
  const size_t sums = round_up(tokens * (a.padded / kSumStride + 1) * sizeof(int32_t), kAlign);
  const size_t bytes = codes * static_cast<size_t>(limbs) + scales + sums + kAlign;
  if (bytes > capacity_) {
    memory_.reset(new uint8_t[bytes]);
    capacity_ = bytes;
  }
  uint8_t* p = align(memory_.get());
  a.high = reinterpret_cast<int8_t*>(p);
  p += codes;
  if (limbs == 2) {
    a.low = reinterpret_cast<int8_t*>(p);
    p += codes;
  }
  a.scales = reinterpret_cast<float*>(p);
  a.sums = reinterpret_cast<int32_t*>(p + scales);
  return a;
}

IntegerRow integer_row(const Activations& a, size_t token) {
  return {a.padded, a.high + token * a.padded, a.low ? a.low + token * a.padded : nullptr,
          a.scales + token * a.groups, a.sums + token * (a.padded / kSumStride + 1)};
}

void quantize_rows(const Activations& a, size_t first, size_t last) {
  const auto quantize = matmul_kernels().quantize_row;
  static thread_local std::vector<float> seen;  // a row without its excluded inputs, or in another order
  for (size_t t = first; t < last; ++t) {
    const float* row = a.values + t * a.value_stride;
    if (a.gathered) {
      seen.resize(a.in_features);
      for (size_t k = 0; k < a.in_features; ++k) {
        const uint32_t input = (*a.gathered)[k];
        seen[k] = input == kNoInput ? 0 : row[input];
      }
      row = seen.data();
    } else if (a.excluded) {
      seen.assign(row, row + a.in_features);
      for (uint32_t column : *a.excluded) seen[column] = 0;
      row = seen.data();
    }
    quantize(row, a.in_features, integer_row(a, t));
  }
}

}  // namespace lowbit
