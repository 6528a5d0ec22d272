#include "layout.h"

#include <algorithm>
#include <cstring>

#include "matrix.h"
#include "team.h"

namespace lowbit {

namespace {

constexpr size_t kVector = 64;
constexpr size_t kSteps = 8;
constexpr size_t kTileBytes = kSteps * kVector;  // of one code per byte

// Plane widths of a code, widest first; 0 ends the list.
constexpr int kPlanes[9][4] = {{0},       {1, 0},    {2, 0},       {2, 1, 0}, {4, 0},
                               {4, 1, 0}, {4, 2, 0}, {4, 2, 1, 0}, {8, 0}};

template <int width>
void pack_plane(const uint8_t* steps, int shift, uint8_t* packed) {
  constexpr int per_byte = 8 / width;
  constexpr uint8_t mask = (1 << width) - 1;
  for (int v = 0; v < width; ++v) {
    const uint8_t* first = steps + static_cast<size_t>(v * per_byte) * kVector;
    for (size_t b = 0; b < kVector; ++b) {
      unsigned byte = 0;
      for (int i = 0; i < per_byte; ++i) byte |= ((first[i * kVector + b] >> shift) & mask) << (width * i);
      packed[v * kVector + b] = static_cast<uint8_t>(byte);
    }
  }
}

template <int width>
void unpack_plane(const uint8_t* packed, int shift, uint8_t* steps) {
  constexpr int per_byte = 8 / width;
  constexpr uint8_t mask = (1 << width) - 1;
  for (int v = 0; v < width; ++v)
    for (int i = 0; i < per_byte; ++i) {
      uint8_t* step = steps + static_cast<size_t>(v * per_byte + i) * kVector;
      for (size_t b = 0; b < kVector; ++b)
        step[b] |= static_cast<uint8_t>(((packed[v * kVector + b] >> (width * i)) & mask) << shift);
    }
}

// Runs work(block) for every block, shared out over the team.
template <typename Work>
void for_blocks(size_t blocks, const Work& work) {
  team()->run([&](const Member& member) {
    size_t begin, end;
    member.share(blocks, &begin, &end);
    for (size_t block = begin; block < end; ++block) work(block);
  });
}

}  // namespace

void pack_tile(const uint8_t* steps, int bits, uint8_t* packed) {
  int shift = 0;
  for (const int* width = kPlanes[bits]; *width; ++width) {
    if (*width == 1) pack_plane<1>(steps, shift, packed);
    if (*width == 2) pack_plane<2>(steps, shift, packed);
    if (*width == 4) pack_plane<4>(steps, shift, packed);
    if (*width == 8) pack_plane<8>(steps, shift, packed);
    packed += static_cast<size_t>(*width) * kVector;
    shift += *width;
  }
}

void unpack_tile(const uint8_t* packed, int bits, uint8_t* steps) {
  std::memset(steps, 0, kTileBytes);
  int shift = 0;
  for (const int* width = kPlanes[bits]; *width; ++width) {
    if (*width == 1) unpack_plane<1>(packed, shift, steps);
    if (*width == 2) unpack_plane<2>(packed, shift, steps);
    if (*width == 4) unpack_plane<4>(packed, shift, steps);
    if (*width == 8) unpack_plane<8>(packed, shift, steps);
    packed += static_cast<size_t>(*width) * kVector;
    shift += *width;
  }
}

void pack_codes(const uint8_t* codes, size_t rows, size_t columns, int bits, uint8_t* packed) {
  const size_t chunks = round_up(columns, kChunk) / kChunk, tile_bytes = kVector * static_cast<size_t>(bits);
  for_blocks(round_up(rows, kBlockRows) / kBlockRows, [&](size_t block) {
    alignas(64) uint8_t steps[kTileBytes];
    for (size_t chunk = 0; chunk < chunks; ++chunk)
      for (size_t tile = 0; tile < 2; ++tile) {
        const size_t first = block * kBlockRows + tile * kTileRows, start = chunk * kChunk;
        const size_t live = first < rows ? std::min(kTileRows, rows - first) : 0;
        const size_t width = std::min(kChunk, columns - start);
        if (live < kTileRows || width < kChunk) std::memset(steps, 0, sizeof steps);
        for (size_t row = 0; row < live; ++row) {
          const uint8_t* source = codes + (first + row) * columns + start;
          for (size_t i = 0; i + 4 <= width; i += 4) std::memcpy(steps + i * 16 + row * 4, source + i, 4);
          for (size_t i = width / 4 * 4; i < width; ++i) steps[i / 4 * kVector + row * 4 + i % 4] = source[i];
        }
        pack_tile(steps, bits, packed + ((block * chunks + chunk) * 2 + tile) * tile_bytes);
      }
  });
}

void unpack_codes(const uint8_t* packed, size_t rows, size_t columns, int bits, uint8_t* codes) {
  const size_t chunks = round_up(columns, kChunk) / kChunk, tile_bytes = kVector * static_cast<size_t>(bits);
  for_blocks(round_up(rows, kBlockRows) / kBlockRows, [&](size_t block) {
    alignas(64) uint8_t steps[kTileBytes];
    for (size_t chunk = 0; chunk < chunks; ++chunk)
      for (size_t tile = 0; tile < 2; ++tile) {
        unpack_tile(packed + ((block * chunks + chunk) * 2 + tile) * tile_bytes, bits, steps);
        const size_t first = block * kBlockRows + tile * kTileRows, start = chunk * kChunk;
        const size_t live = first < rows ? std::min(kTileRows, rows - first) : 0;
        const size_t width = std::min(kChunk, columns - start);
        for (size_t row = 0; row < live; ++row) {
          uint8_t* target = codes + (first + row) * columns + start;
          for (size_t i = 0; i < width; ++i) target[i] = steps[i / 4 * kVector + row * 4 + i % 4];
        }
      }
  });
}

void pack_base3_vector(const uint8_t* steps, uint8_t* packed) {
  for (size_t b = 0; b < kVector; ++b) {
    unsigned n = 0;
    for (size_t i = kBase3Steps - 1; i-- > 0;) n = 3 * n + steps[i * kVector + b];
    const unsigned last = steps[(kBase3Steps - 1) * kVector + b];
    packed[b] = static_cast<uint8_t>(n < 64 ? 64 * last + n : 3 * n + last);  // 192 + 3 (n - 64) + last
  }
}

void pack_base3(const uint8_t* codes, size_t rows, size_t columns, uint8_t* packed) {
  const size_t vectors = (columns + kBase3Inputs - 1) / kBase3Inputs;
  for_blocks(round_up(rows, kBlockRows) / kBlockRows, [&](size_t block) {
    alignas(64) uint8_t steps[kBase3Steps * kVector];
    for (size_t vector = 0; vector < vectors; ++vector)
      for (size_t tile = 0; tile < 2; ++tile) {
        const size_t first = block * kBlockRows + tile * kTileRows, start = vector * kBase3Inputs;
        const size_t live = first < rows ? std::min(kTileRows, rows - first) : 0;
        const size_t width = std::min(kBase3Inputs, columns - start);
        if (live < kTileRows || width < kBase3Inputs) std::memset(steps, kBase3Padding, sizeof steps);
        for (size_t row = 0; row < live; ++row) {
          const uint8_t* source = codes + (first + row) * columns + start;
          for (size_t i = 0; i < width; ++i) steps[i / 4 * kVector + row * 4 + i % 4] = source[i];
        }
        pack_base3_vector(steps, packed + ((block * vectors + vector) * 2 + tile) * kVector);
      }
  });
}

void unpack_base3(const uint8_t* packed, size_t rows, size_t columns, uint8_t* codes) {
  const size_t vectors = (columns + kBase3Inputs - 1) / kBase3Inputs;
  for_blocks(round_up(rows, kBlockRows) / kBlockRows, [&](size_t block) {
    for (size_t vector = 0; vector < vectors; ++vector)
      for (size_t tile = 0; tile < 2; ++tile) {
        const uint8_t* source = packed + ((block * vectors + vector) * 2 + tile) * kVector;
        const size_t first = block * kBlockRows + tile * kTileRows, start = vector * kBase3Inputs;
        const size_t live = first < rows ? std::min(kTileRows, rows - first) : 0;
        const size_t width = std::min(kBase3Inputs, columns - start);
        for (size_t row = 0; row < live; ++row) {
          uint8_t* target = codes + (first + row) * columns + start;
          for (size_t j = 0; j < 4; ++j) {
            const unsigned byte = source[4 * row + j];
            const unsigned n = byte < 192 ? byte & 63 : byte / 3, last = byte < 192 ? byte >> 6 : byte % 3;
            const unsigned digits[kBase3Steps] = {n % 3, n / 3 % 3, n / 9 % 3, n / 27, last};
            for (size_t i = j; i < width; i += 4) target[i] = static_cast<uint8_t>(digits[i / 4]);
          }
        }
      }
  });
}

}  // namespace lowbit
