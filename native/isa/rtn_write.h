// Results of round-to-nearest into their places: codes, scales, sums of errors.
#pragma once

#include <cstring>

#include "isa/rtn_search.h"
#include "layout.h"

namespace lowbit::LOWBIT_ISA::rtn {

// words[n / 4 rounded up][16]: the codes of four inputs in the four bytes of each lane. Returns the plain
// squared error. Lanes whose group chose another table contribute zero to both.
template <typename Levels>
F32 write_codes(const Group& g, F32 unit, const Levels& levels, F32 selector, F32 number, int32_t* words) {
  const F32 inv = inverse(unit), other = abs(sub(selector, number));
  F32 error = zero_f32();
  for (size_t i = 0; i < g.n; i += 4) {
    const size_t live = g.n - i < 4 ? g.n - i : 4;
    I32 word = zero_i32();
    for (size_t j = live; j-- > 0;) {
      const F32 v = load(g.w + 16 * (i + j)), x = mul(v, inv), rest = sub(v, mul(unit, levels.value(x)));
      error = add(error, mul(rest, rest));
      word = add(shift_left<8>(word), to_i32(select_gt(set1(0.5f), other, levels.code(x), zero_f32())));
    }
    store_i32(words + 4 * i, add(load_i32(words + 4 * i), word));
  }
  return select_gt(set1(0.5f), other, error, zero_f32());
}

inline void store_scales(const RtnJob& job, F32 scale, size_t index, size_t live) {
  if (job.scale_type == Number::fp32) {
    store_n(static_cast<float*>(job.scales) + index, scale, live);
  } else if (job.scale_type == Number::fp16) {
    uint16_t half[16];
    store_fp16(half, scale);
    std::memcpy(static_cast<uint16_t*>(job.scales) + index, half, 2 * live);
  } else {
    float lanes[16];
    store(lanes, scale);
    for (size_t i = 0; i < live; ++i)
      static_cast<uint8_t*>(job.scales)[index + i] =
          job.scale_type == Number::e8m0 ? to_e8m0(lanes[i]) : to_e4m3(lanes[i]);
  }
}

inline void store_bytes(F32 v, uint8_t* out, size_t live) {
  float lanes[16];
  store(lanes, v);
  for (size_t i = 0; i < live; ++i) out[i] = static_cast<uint8_t>(lanes[i]);
}

// Packs the codes of a tile, one to a byte in steps[padded / 4][64], after giving padding its code.
inline void pack(const RtnJob& job, size_t block, size_t tile, size_t live, size_t padded, uint8_t* steps,
                 uint8_t* packed) {
  const int padding = job.base3 ? kBase3Padding : 0;
  if (live < kTileRows)
    for (size_t i = 0; i < padded / 4; ++i)
      std::memset(steps + 64 * i + 4 * live, padding, 4 * (kTileRows - live));
  for (size_t i = job.columns; i < padded && padding; ++i)
    for (size_t row = 0; row < live; ++row) steps[i / 4 * 64 + 4 * row + i % 4] = kBase3Padding;
  if (job.base3) {
    const size_t vectors = padded / kBase3Inputs;
    for (size_t v = 0; v < vectors; ++v)
      pack_base3_vector(steps + v * kBase3Steps * 64, packed + ((block * vectors + v) * 2 + tile) * 64);
    return;
  }
  const size_t chunks = padded / kChunk, tile_bytes = 64 * static_cast<size_t>(job.bits);
  for (size_t chunk = 0; chunk < chunks; ++chunk)
    pack_tile(steps + chunk * 8 * 64, job.bits, packed + ((block * chunks + chunk) * 2 + tile) * tile_bytes);
}

// Where the results of one group go.
struct Target {
  size_t block, tile, live;  // live rows of the tile
  int32_t* words;            // [n / 4 rounded up][16] of the first plane, see write_codes
  size_t plane_words;        // to those of the next plane
  double* error;             // sums over live rows
  double* square;
};

// Adds up the squared errors `plain` of a group, and the squares of its weights.
inline void add_sums(const Group& g, F32 plain, const Target& out) {
  float errors[16], rms[16];
  store(errors, plain);
  store(rms, g.rms);
  for (size_t row = 0; row < out.live; ++row) {
    *out.error += errors[row];
    *out.square += static_cast<double>(rms[row]) * rms[row] * static_cast<double>(g.n);
  }
}

}  // namespace lowbit::LOWBIT_ISA::rtn
