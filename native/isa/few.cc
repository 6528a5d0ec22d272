// Two to a dozen tokens times a block of codes: decoded in registers as for one token (gemv.cc), each step
// then multiplied with up to four tokens. A dot product waits for the one before it in the same sum, so for
// one token most of its time is idle and three more tokens cost little.
#include <array>

#include "gemv.h"

namespace lowbit::LOWBIT_ISA {

void few(const CodeTerm& t, size_t block, const Activations& a, size_t first, size_t count, float* acc,
         uint8_t* scratch);

namespace {

constexpr size_t kWidest = 4;  // 8 sums, 8 steps of codes

// Both tiles' steps times 32 activations of one token.
template <int bits, Map map>
LOWBIT_INLINE void dot_tiles(I32 (&sum)[2], const U8 (&bytes)[2][kSteps], const int8_t* x) {
#if defined(LOWBIT_ISA_avx512)
  // As assembly, because GCC 12 otherwise fetches the activations of all tokens first and the sums lose their
  // registers. One broadcast serves both tiles.
  unroll<kSteps>([&](auto step) LOWBIT_UNROLLED {
    const I32 v = broadcast4(x + 4 * step);
    asm volatile("vpdpbusd %4, %2, %0\n\tvpdpbusd %4, %3, %1"
                 : "+v"(sum[0].v), "+v"(sum[1].v)
                 : "v"(bytes[0][step].v), "v"(bytes[1][step].v), "v"(v.v));
  });
#else
  unroll<2>([&](auto tile) LOWBIT_UNROLLED { sum[tile] = dot_chunk<bits, map>(sum[tile], bytes[tile], x); });
#endif
}

template <int bits, Map map, int limbs, size_t tokens>
void tile_of_tokens(const CodeTerm& t, size_t block, const Activations& a, size_t first, float* acc,
                    const float* scales) {
  const size_t padded = a.padded;
  const uint8_t* codes = t.codes + block * (padded / kChunk) * 2 * 64 * bits;
  F32 run[tokens][2];
  const Runs runs = runs_of(t);
  const bool stepped = map == Map::linear && t.step != 1;
  size_t group = 0, group_end = t.group_size;
  for (size_t k = 0, end; k < padded; k = end) {
    end = segment_end(k, group_end, padded);
    const bool begins = runs.first(k, group_end - t.group_size), ends = runs.last(end, group_end, padded);
    SegmentScale s[tokens];
    I32 sum[tokens][limbs][2];
    unroll<tokens>([&](auto i) LOWBIT_UNROLLED {
      s[i] = segment_scale(a, first + i, k, end);
      unroll<2>([&](auto tile) LOWBIT_UNROLLED {
        sum[i][0][tile] = zero_i32();
        sum[i][limbs - 1][tile] =
            stepped ? start<bits, map, false>(t.base, s[i]) : start<bits, map, true>(t.base, s[i]);
      });
    });
    for (size_t c = k; c < end; c += kChunk) {
      U8 bytes[2][kSteps];
      unroll<2>([&](auto tile) LOWBIT_UNROLLED {
        unpack_codes<bits>(codes, bytes[tile]);
        if constexpr (map == Map::table1)
          unroll<kSteps>([&](auto step) LOWBIT_UNROLLED {
            bytes[tile][step] = lookup<bits>(t.high, bytes[tile][step]);
          });
        fetch_ahead<bits>(codes);
        codes += 64 * bits;
      });
      unroll<tokens * limbs>([&](auto i) LOWBIT_UNROLLED {
        const size_t token = i / limbs, limb = i % limbs;
        const int8_t* const x = (limb ? a.low : a.high) + (first + token) * padded + c;
        dot_tiles<bits, map>(sum[token][limb], bytes, x);
      });
    }
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      TileScale w = {};
      w.scale = load(scales + group * kBlockRows + tile * kTileRows);
      unroll<tokens>([&](auto i) LOWBIT_UNROLLED {
        I32 dot[1][limbs];
        unroll<limbs>([&](auto limb) LOWBIT_UNROLLED { dot[0][limb] = sum[i][limb][tile]; });
        float* const at = acc + i * kBlockRows + tile * kTileRows;
        F32 f = load(at);
        const F32 total =
            stepped ? segment_total<map, false>(dot, t, w, s[i]) : segment_total<map, true>(dot, t, w, s[i]);
        add_total<true>(f, run[i][tile], total, begins, ends, runs.weights_outer, t, w, s[i]);
        store(at, f);
      });
    });
    if (end == group_end) {
      ++group;
      group_end += t.group_size;
    }
  }
}

using Tile = void (*)(const CodeTerm&, size_t, const Activations&, size_t, float*, const float*);

template <int bits, Map map, int limbs>
constexpr std::array<Tile, kWidest + 1> widths() {
  return {nullptr, nullptr, tile_of_tokens<bits, map, limbs, 2>, tile_of_tokens<bits, map, limbs, 3>,
          tile_of_tokens<bits, map, limbs, 4>};
}

template <int bits>
std::array<Tile, kWidest + 1> widths_of(Map map, int limbs) {
  if (map == Map::linear) return limbs == 2 ? widths<bits, Map::linear, 2>() : widths<bits, Map::linear, 1>();
  return limbs == 2 ? widths<bits, Map::table1, 2>() : widths<bits, Map::table1, 1>();
}

std::array<Tile, kWidest + 1> tiles_of(const CodeTerm& t, int limbs) {
  switch (t.bits) {
    case 1:
      return widths_of<1>(t.map, limbs);
    case 2:
      return widths_of<2>(t.map, limbs);
    case 3:
      return widths_of<3>(t.map, limbs);
    case 4:
      return widths_of<4>(t.map, limbs);
    case 5:
      return widths_of<5>(t.map, limbs);
    case 6:
      return widths_of<6>(t.map, limbs);
    case 7:
      return widths_of<7>(t.map, limbs);
    default:
      return widths_of<8>(t.map, limbs);
  }
}

}  // namespace

// Two tokens or more, in tiles of nearly equal width: none is of one token.
void few(const CodeTerm& t, size_t block, const Activations& a, size_t first, size_t count, float* acc,
         uint8_t* scratch) {
  float* const scales = reinterpret_cast<float*>(scratch);
  block_scales(t, block, scales);
  const std::array<Tile, kWidest + 1> tiles = tiles_of(t, a.limbs);
  for (size_t left = (count + kWidest - 1) / kWidest; left; --left) {
    const size_t width = (count + left - 1) / left;
    tiles[width](t, block, a, first, acc, scales);
    first += width, acc += width * kBlockRows, count -= width;
  }
}

}  // namespace lowbit::LOWBIT_ISA
