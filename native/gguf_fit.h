// Floats to the blocks of GGUF types whose scales are quantized themselves or come with an offset.
// What is computed: interop/gguf_fit.py. Every instruction set gives the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

struct FitType {
  int number;  // in ggml's enum ggml_type
  size_t weights, bytes;
};

// The type with ggml's number if there is a fit for it, else null.
const FitType* find_fit_type(int number);

// weights [blocks][type.weights] to out [blocks][type.bytes], on all threads of team(). Weights are finite.
void fit_blocks(const FitType& type, const float* weights, size_t blocks, uint8_t* out);

// Kernel of up to 16 blocks (isa/gguf_fit.cc): `live` blocks, scratch of kFitScratch floats, 64-byte aligned.
constexpr size_t kFitScratch = 2 * 256 * 16;
using FitTile = void (*)(int number, const float* weights, size_t live, uint8_t* out, float* scratch);

// Rows first .. first + count of packed values [blocks][columns][32] as float32 [count][columns].
// bytes: 4 (float32) or 2, then bf16 or fp16. `first` is a multiple of 32.
void float_rows(const void* packed, size_t bytes, bool bf16, size_t first, size_t count, size_t columns,
                float* out);

}  // namespace lowbit
