// Plain floats in kernel order back to rows.
#include "matrix.h"
#include "simd/simd.h"

namespace lowbit::LOWBIT_ISA {

void rows_of_block(const void* packed, size_t bytes, bool bf16, size_t live, size_t columns, float* out);

// Packed values [columns][32] of one block of rows to float32 [live][columns].
void rows_of_block(const void* packed, size_t bytes, bool bf16, size_t live, size_t columns, float* out) {
  constexpr size_t kStrip = 16;  // columns at a time: whole cache lines on both sides
  alignas(64) float wide[kStrip * kBlockRows];
  for (size_t start = 0; start < columns; start += kStrip) {
    const size_t count = columns - start < kStrip ? columns - start : kStrip;
    for (size_t i = 0; i < count; ++i)
      for (size_t half = 0; half < kBlockRows; half += 16) {
        const size_t index = (start + i) * kBlockRows + half;
        const uint16_t* narrow = static_cast<const uint16_t*>(packed) + index;
        const F32 v = bytes == 4 ? load(static_cast<const float*>(packed) + index)
                      : bf16     ? load_bf16(narrow)
                                 : load_fp16(narrow);
        store(wide + i * kBlockRows + half, v);
      }
    for (size_t row = 0; row < live; ++row)
      for (size_t i = 0; i < count; ++i) out[row * columns + start + i] = wide[i * kBlockRows + row];
  }
}

}  // namespace lowbit::LOWBIT_ISA
