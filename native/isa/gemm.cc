// Many tokens times one unpacked block of 32 rows (panel.h). The panel stays in the first- or second-level
// cache; tokens stream past it, up to six at a time, so that a step costs 2 loads of weights, a broadcast per
// token and 2 dot products per token.
#include <algorithm>

#include "decode.h"
#include "panel.h"
#include "simd/dot_tile.h"

namespace lowbit::LOWBIT_ISA {

void gemm(const CodeTerm& t, const uint8_t* memory, const Activations& a, size_t first, size_t count,
          float* out, size_t stride, bool fresh);

namespace {

// Everything a product needs beside its template arguments.
struct Operands {
  const CodeTerm& t;
  const Panel& panel;
  const Activations& a;
  size_t stop;  // where the last group ends: up to half a chunk before the padding does
  // The tile of tokens at hand, and where its sums go: out[token * stride + row].
  size_t first;
  float* out;
  size_t stride;
  bool fresh;  // out does not hold anything yet
};

// Sums of a tile of tokens as they are in `out`. What is written at the end of a tile is asked for at its
// beginning: rows of `out` lie far apart, and waiting for their lines cost 5% of the time.
template <size_t columns>
LOWBIT_INLINE void begin_tile(const Operands& o, F32 (&f)[columns][2]) {
  unroll<columns>([&](auto c) LOWBIT_UNROLLED {
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      float* const at = o.out + c * o.stride + tile * kTileRows;
      __builtin_prefetch(at, 1, 3);
      f[c][tile] = o.fresh ? zero_f32() : load(at);
    });
  });
}

template <size_t columns>
LOWBIT_INLINE void end_tile(const Operands& o, const F32 (&f)[columns][2]) {
  unroll<columns>([&](auto c) LOWBIT_UNROLLED {
    unroll<2>([&](auto tile) LOWBIT_UNROLLED { store(o.out + c * o.stride + tile * kTileRows, f[c][tile]); });
  });
}

// The same where sums do not stay in registers: [columns][32] in the first-level cache.
template <size_t columns>
struct TileMemory {
  alignas(64) float f[columns][kBlockRows];
  LOWBIT_INLINE explicit TileMemory(const Operands& o) {
    F32 begin[columns][2];
    begin_tile(o, begin);
    unroll<columns>([&](auto c) LOWBIT_UNROLLED {
      unroll<2>([&](auto tile) LOWBIT_UNROLLED { store(f[c] + tile * kTileRows, begin[c][tile]); });
    });
  }
  LOWBIT_INLINE void finish(const Operands& o) const {
    F32 end[columns][2];
    unroll<columns>([&](auto c) LOWBIT_UNROLLED {
      unroll<2>([&](auto tile) LOWBIT_UNROLLED { end[c][tile] = load(f[c] + tile * kTileRows); });
    });
    end_tile(o, end);
  }
};

// The exact integers of inputs [k, end) as floats: weight_limbs x limbs dot products, each pair of limbs
// 128 times the next. Limbs are joined in the sums themselves, by a shift between two of them, wherever that
// fits int32: 16256 * 127 * 64 of levels with int8 activations does, and rounds to the same float as the
// fused multiply-add of two limbs that decode.h has.
template <size_t columns, int weight_limbs, int limbs, bool plain, int depth>
LOWBIT_INLINE void segment(const Operands& o, size_t number, size_t group, size_t k, size_t end,
                           F32 (&total)[columns][2]) {
  constexpr bool joined = plain && weight_limbs == 2 && limbs == 1;
  const size_t padded = o.a.padded;
  I32 sum[columns][2];
  unroll<weight_limbs>([&](auto w) LOWBIT_UNROLLED {
    const bool last = w + 1 == weight_limbs;
    const int32_t* const starts = o.panel.starts[w] + number * kBlockRows;
    const int8_t* const weights = o.panel.weights[w] + k * kBlockRows;
    unroll<limbs>([&](auto limb) LOWBIT_UNROLLED {
      const bool fresh = limb == 0 && !(joined && w > 0);
      unroll<2>([&](auto tile) LOWBIT_UNROLLED {
        const I32 begin = kBiased<depth> ? load_i32(starts + tile * kTileRows) : zero_i32();
        unroll<columns>([&](auto c) LOWBIT_UNROLLED {
          sum[c][tile] = fresh ? begin : add(shift_left<7>(sum[c][tile]), begin);
        });
      });
      const int8_t* const codes = limb + 1 == limbs && limbs == 2 ? o.a.low : o.a.high;
      add_dots<columns, depth>(sum, weights, codes + o.first * padded + k, padded, end - k);
    });
    if (joined && !last) return;
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      I32 correction = zero_i32();
      if constexpr (!plain) {
        if (last && o.panel.head->wide)
          correction = load_i32(o.panel.corrections + group * kBlockRows + tile * kTileRows);
      }
      unroll<columns>([&](auto c) LOWBIT_UNROLLED {
        I32 exact = sum[c][tile];
        if constexpr (!plain) {
          if (last && o.panel.head->wide) {
            const SegmentScale s = segment_scale(o.a, o.first + c, k, end);
            exact = add(mul(exact, set1_i32(o.panel.head->step)), mul(correction, set1_i32(s.sum)));
          }
        }
        const F32 value = to_f32(exact);
        const bool first = w == 0 || joined;
        total[c][tile] = first ? value : fma(total[c][tile], set1(static_cast<float>(kLimbBase)), value);
      });
    });
  });
}

// The order of float operations is that of decode.h, Runs: each segment a run of its own here.
template <size_t columns, int weight_limbs, int limbs, int depth>
void single_runs(const Operands& o) {
  const CodeTerm& t = o.t;
  const bool weights_outer = runs_of(t).weights_outer;
  F32 f[columns][2];
  begin_tile(o, f);
  const float* const activation_scales = o.a.scales + o.first * o.a.groups;
  size_t number = 0, group = 0, group_end = t.group_size;
  for (size_t k = 0, end; k < o.stop; k = end, ++number) {
    end = segment_end(k, group_end, o.stop);
    F32 total[columns][2];
    segment<columns, weight_limbs, limbs, true, depth>(o, number, group, k, end, total);
    const float* const weight_scales = o.panel.scales + group * kBlockRows;
    const float* const scales = activation_scales + k / kActivationGroup;
    if (weights_outer) {
      unroll<columns>([&](auto c) LOWBIT_UNROLLED {
        const F32 activation = set1(scales[c * o.a.groups]);
        unroll<2>([&](auto tile) LOWBIT_UNROLLED {
          f[c][tile] =
              fma(mul(total[c][tile], activation), load(weight_scales + tile * kTileRows), f[c][tile]);
        });
      });
    } else {
      unroll<columns>([&](auto c) LOWBIT_UNROLLED {
        const F32 activation = set1(scales[c * o.a.groups]);
        unroll<2>([&](auto tile) LOWBIT_UNROLLED {
          f[c][tile] =
              fma(mul(total[c][tile], load(weight_scales + tile * kTileRows)), activation, f[c][tile]);
        });
      });
    }
    if (end == group_end) {
      ++group;
      group_end += t.group_size;
    }
  }
  end_tile(o, f);
}

// Runs of several segments. Their totals need the registers, so f stays in memory and moves once per run, or
// with offsets once per segment.
template <size_t columns, int weight_limbs, int limbs, int depth, bool weights_outer, bool offsets>
void long_runs(const Operands& o) {
  const CodeTerm& t = o.t;
  TileMemory<columns> memory(o);
  const float* const activation_scales = o.a.scales + o.first * o.a.groups;
  size_t number = 0, group = 0, group_end = t.group_size;
  for (size_t k = 0; k < o.stop;) {
    F32 run[columns][2];
    const float* const scales = activation_scales + k / kActivationGroup;
    const size_t run_end = weights_outer ? group_end : std::min(k + kActivationGroup, o.stop);
    const size_t run_begin = k;
    for (bool first = true; k < run_end; first = false, ++number) {
      const size_t end = segment_end(k, group_end, o.stop);
      F32 total[columns][2];
      segment<columns, weight_limbs, limbs, true, depth>(o, number, group, k, end, total);
      const float* const weight_scales = o.panel.scales + group * kBlockRows;
      const size_t at = (k - run_begin) / kActivationGroup;
      const auto inner = [&](auto c, auto tile) LOWBIT_UNROLLED {
        return weights_outer ? set1(scales[c * o.a.groups + at]) : load(weight_scales + tile * kTileRows);
      };
      if (first) {
        unroll<columns>([&](auto c) LOWBIT_UNROLLED {
          unroll<2>([&](auto tile) LOWBIT_UNROLLED { run[c][tile] = mul(total[c][tile], inner(c, tile)); });
        });
      } else {
        unroll<columns>([&](auto c) LOWBIT_UNROLLED {
          unroll<2>([&](auto tile) LOWBIT_UNROLLED {
            run[c][tile] = fma(total[c][tile], inner(c, tile), run[c][tile]);
          });
        });
      }
      if (end == run_end) {
        unroll<columns>([&](auto c) LOWBIT_UNROLLED {
          unroll<2>([&](auto tile) LOWBIT_UNROLLED {
            float* const at_f = memory.f[c] + tile * kTileRows;
            const F32 outer =
                weights_outer ? load(weight_scales + tile * kTileRows) : set1(scales[c * o.a.groups]);
            store(at_f, fma(run[c][tile], outer, load(at_f)));
          });
        });
      }
      if constexpr (offsets) {
        const float* const group_offsets = o.panel.offsets + group * kBlockRows;
        unroll<columns>([&](auto c) LOWBIT_UNROLLED {
          const SegmentScale s = segment_scale(o.a, o.first + c, k, end);
          const F32 sum = set1(static_cast<float>(s.sum) * s.activation);
          unroll<2>([&](auto tile) LOWBIT_UNROLLED {
            float* const at_f = memory.f[c] + tile * kTileRows;
            store(at_f, fma(load(group_offsets + tile * kTileRows), sum, load(at_f)));
          });
        });
      }
      if (end == group_end) {
        ++group;
        group_end += t.group_size;
      }
      k = end;
    }
  }
  memory.finish(o);
}

// Wide panels, and offsets of groups that are runs of their own, which are rare: the definition of decode.h
// as it stands.
template <size_t columns, int weight_limbs, int limbs>
void general(const Operands& o) {
  const CodeTerm& t = o.t;
  TileMemory<columns> memory(o);
  const Runs runs = runs_of(t);
  F32 run[columns][2] = {};
  size_t number = 0, group = 0, group_end = t.group_size;
  for (size_t k = 0, end; k < o.stop; k = end, ++number) {
    end = segment_end(k, group_end, o.stop);
    F32 total[columns][2];
    segment<columns, weight_limbs, limbs, false, kDepths ? 0 : 1>(o, number, group, k, end, total);
    const bool first = runs.first(k, group_end - t.group_size), last = runs.last(end, group_end, o.stop);
    for (size_t tile = 0; tile < 2; ++tile) {
      const size_t row = group * kBlockRows + tile * kTileRows;
      TileScale w = {};
      w.scale = load(o.panel.scales + row);
      if (t.offsets) w.offset = load(o.panel.offsets + row);
      for (size_t c = 0; c < columns; ++c) {
        const SegmentScale s = segment_scale(o.a, o.first + c, k, end);
        float* const at = memory.f[c] + tile * kTileRows;
        F32 f = load(at);
        add_total<false>(f, run[c][tile], total[c][tile], first, last, runs.weights_outer, t, w, s);
        store(at, f);
      }
    }
    if (end == group_end) {
      ++group;
      group_end += t.group_size;
    }
  }
  memory.finish(o);
}

template <size_t columns, int weight_limbs, int limbs, int depth, bool offsets>
void product(const Operands& o) {
  const Runs runs = runs_of(o.t);
  if constexpr (!offsets)
    if (runs.single) return single_runs<columns, weight_limbs, limbs, depth>(o);
  if (runs.weights_outer) return long_runs<columns, weight_limbs, limbs, depth, true, offsets>(o);
  long_runs<columns, weight_limbs, limbs, depth, false, offsets>(o);
}

using Tile = void (*)(const Operands&);

// Calls tiles[w] for w tokens at a time, in tiles of nearly equal width: two of four take less time than one
// of six and one of two.
template <size_t widest>
void walk(Operands o, size_t count, const Tile (&tiles)[widest]) {
  for (size_t left = (count + widest - 1) / widest; left; --left) {
    const size_t width = (count + left - 1) / left;
    tiles[width - 1](o);
    o.first += width, o.out += width * o.stride, count -= width;
  }
}

template <int weight_limbs, int limbs, int depth, size_t... narrower>
void walk_products(const Operands& o, size_t count, std::index_sequence<narrower...>) {
  if constexpr (weight_limbs == 1) {
    constexpr Tile tiles[] = {product<narrower + 1, weight_limbs, limbs, depth, true>...};
    if (o.t.offsets) return walk(o, count, tiles);
  }
  constexpr Tile tiles[] = {product<narrower + 1, weight_limbs, limbs, depth, false>...};
  walk(o, count, tiles);
}

template <int weight_limbs, int limbs>
void columns_any(const Operands& o, size_t count) {
  if (o.panel.head->wide || (o.t.offsets && (weight_limbs == 2 || runs_of(o.t).single))) {
    constexpr Tile tiles[] = {general<1, weight_limbs, limbs>, general<2, weight_limbs, limbs>};
    return walk(o, count, tiles);
  }
  constexpr bool four_limbs = weight_limbs == 2 && limbs == 2;  // sums and totals need registers
  constexpr auto widths = std::make_index_sequence<four_limbs ? kTileColumns / 2 + 1 : kTileColumns>();
  if constexpr (!kDepths) {
    walk_products<weight_limbs, limbs, 1>(o, count, widths);
  } else {
    if constexpr (weight_limbs == 1) {
      const int peak = o.panel.head->peak;
      if (peak <= largest_weight(8)) return walk_products<weight_limbs, limbs, 8>(o, count, widths);
      if (peak <= largest_weight(4)) return walk_products<weight_limbs, limbs, 4>(o, count, widths);
      if (peak <= largest_weight(1)) return walk_products<weight_limbs, limbs, 1>(o, count, widths);
    }
    walk_products<weight_limbs, limbs, 0>(o, count, widths);
  }
}

}  // namespace

void gemm(const CodeTerm& t, const uint8_t* memory, const Activations& a, size_t first, size_t count,
          float* out, size_t stride, bool fresh) {
  Panel panel;
  lay_out_panel(t, a.padded, const_cast<uint8_t*>(memory), &panel);
  const Operands o = {t, panel, a, t.groups * t.group_size, first, out, stride, fresh};
  if (t.map == Map::table2) {
    if (a.limbs == 2) return columns_any<2, 2>(o, count);
    return columns_any<2, 1>(o, count);
  }
  if (a.limbs == 2) return columns_any<1, 2>(o, count);
  columns_any<1, 1>(o, count);
}

}  // namespace lowbit::LOWBIT_ISA
