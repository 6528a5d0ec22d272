// Integer sums of the segments of a block times a tile of tokens, decoded in registers: every code is
// unpacked once for all of them. One body per width and kind of levels; what surrounds it is in few.cc.
#include "few.h"
#include "gemv.h"

namespace lowbit::LOWBIT_ISA {
namespace {

// What a chunk at `codes` asks for, the `chunk`th of the block.
template <size_t lines>
LOWBIT_INLINE void fetch(const Columns& o, const uint8_t* codes, size_t chunk) {
  if (!o.ahead) return fetch_ahead<lines>(codes);
  const uint8_t* const first = o.ahead + chunk * o.lines * 64;
  for (size_t line = 0; line < o.lines; ++line) __builtin_prefetch(first + 64 * line, 0, 2);
}

#if defined(LOWBIT_ISA_avx512)
// Step s of a tile's chunk. Shifts and masks take ports that dot products leave free; a placement of bits
// (GFNI) takes theirs.
template <int bits, Map map, size_t s>
LOWBIT_INLINE U8 step_of(const CodeTerm& t, const U8 (&v)[bits]) {
  U8 code;
  if constexpr (bits == 3) {
    code = and_(shift_right_loose<(s & 2) * 2>(two_codes_of_three<s & ~size_t{2}>(v)), set1_u8(7));
  } else if constexpr (bits < 5) {
    constexpr size_t each = 8 / bits, from = s % each * bits;
    const U8 raw = from ? shift_right_loose<from>(v[s / each]) : v[s / each];
    if constexpr (map == Map::table1 && bits == 4) return lookup_low4(t.high, raw);
    code = and_(raw, set1_u8((1 << bits) - 1));
  } else {
    code = code_step<bits, s>(v);
  }
  return map == Map::linear ? code : lookup<bits>(t.high, code);
}

// Two tiles' step times four activations, those of the column'th row after x. As assembly with its address,
// because GCC 12 otherwise fetches the activations of all tokens first and the sums lose their registers, or
// computes an address for every one.
template <size_t column, int offset>
LOWBIT_INLINE void dot_pair(I32 (&sum)[2], U8 w0, U8 w1, const int8_t* x, size_t stride) {
#define LOWBIT_DOT_PAIR(address)                                                   \
  asm volatile("vpbroadcastd %c4" address                                          \
               ", %%zmm31\n\tvpdpbusd %%zmm31, %2, %0\n\tvpdpbusd %%zmm31, %3, %1" \
               : "+v"(sum[0].v), "+v"(sum[1].v)                                    \
               : "v"(w0.v), "v"(w1.v), "i"(offset), "r"(x), "r"(stride)            \
               : "xmm31", "memory")
  if constexpr (column == 0) LOWBIT_DOT_PAIR("(%5)");
  if constexpr (column == 1) LOWBIT_DOT_PAIR("(%5,%6)");
  if constexpr (column == 2) LOWBIT_DOT_PAIR("(%5,%6,2)");
#undef LOWBIT_DOT_PAIR
}

// Sums of a segment scaled and added up while they are in registers: add_total() of decode.h. Everything that
// is not a number is read first: a store through a pointer might change it, thinks the compiler.
template <size_t columns, bool outer, bool first, bool last>
LOWBIT_INLINE void finish_as(const I32 (&sum)[columns][2], const Totals& o, const Span& s) {
  const float *scales = o.scales + s.group * kBlockRows,
              *activations = o.activations + s.k / kActivationGroup;
  float *const f = o.f, *const run = o.run;
  const size_t groups = o.groups;
  const F32 weights[2] = {load(scales), load(scales + kTileRows)};
  expand<columns>([&](auto c) LOWBIT_EXPANDED {
    const F32 activation = outer || last ? set1(activations[c * groups]) : F32();
    expand<2>([&](auto tile) LOWBIT_EXPANDED {
      constexpr size_t at = c * kBlockRows + tile * kTileRows;
      const F32 total = to_f32(sum[c][tile]), inner = outer ? activation : weights[tile];
      const F32 open = first ? mul(total, inner) : fma(total, inner, load(run + at));
      if constexpr (last)
        store(f + at, fma(open, outer ? weights[tile] : activation, load(f + at)));
      else
        store(run + at, open);
    });
  });
}

template <size_t columns>
LOWBIT_INLINE void finish(const I32 (&sum)[columns][2], const Totals& o, const Span& s) {
  if (o.weights_outer) {
    if (s.first && s.last) return finish_as<columns, true, true, true>(sum, o, s);
    if (s.first) return finish_as<columns, true, true, false>(sum, o, s);
    if (s.last) return finish_as<columns, true, false, true>(sum, o, s);
    return finish_as<columns, true, false, false>(sum, o, s);
  }
  if (s.first && s.last) return finish_as<columns, false, true, true>(sum, o, s);
  if (s.first) return finish_as<columns, false, true, false>(sum, o, s);
  if (s.last) return finish_as<columns, false, false, true>(sum, o, s);
  return finish_as<columns, false, false, false>(sum, o, s);
}

template <int bits, Map map, size_t columns>
void sums_of(const CodeTerm& t, const Columns& o, const Span* spans, size_t count, I32* out,
             const Totals& totals) {
  const uint8_t* codes = o.codes + spans->k / kChunk * 2 * 64 * bits;
  const int32_t* starts = o.starts;
  const size_t stride = o.stride;
  for (const Span* s = spans; s < spans + count; ++s, starts += columns) {
    I32 sum[columns][2];
    expand<columns>([&](auto c) LOWBIT_EXPANDED { sum[c][0] = sum[c][1] = set1_i32(starts[c]); });
    const int8_t* x[(columns + 2) / 3];  // every third column, so that an address is one operand
    expand<(columns + 2) / 3>([&](auto i) LOWBIT_EXPANDED { x[i] = o.x + 3 * i * stride + s->k; });
    for (size_t k = s->k; k < s->end; k += kChunk) {
      U8 v[2][bits];
      expand<2 * bits>([&](auto i) LOWBIT_EXPANDED { v[i / bits][i % bits] = load_u8(codes + 64 * i); });
      expand<kSteps>([&](auto step) LOWBIT_EXPANDED {
        const U8 w0 = step_of<bits, map, step>(t, v[0]), w1 = step_of<bits, map, step>(t, v[1]);
        expand<columns>([&](auto c)
                            LOWBIT_EXPANDED { dot_pair<c % 3, 4 * step>(sum[c], w0, w1, x[c / 3], stride); });
      });
      fetch<2 * bits>(o, codes, k / kChunk);
      codes += 2 * 64 * bits;
      expand<(columns + 2) / 3>([&](auto i) LOWBIT_EXPANDED { x[i] += kChunk; });
    }
    if (!out) {
      finish<columns>(sum, totals, *s);
      continue;
    }
    expand<2 * columns>([&](auto i) LOWBIT_EXPANDED { out[i] = sum[i / 2][i % 2]; });
    out += 2 * columns;
  }
}

// Both limbs of `tokens` tokens: the codes are unpacked once for them and the integers joined in registers.
template <int bits, Map map, size_t tokens>
void paired_sums_of(const CodeTerm& t, const Columns& o, const Span* spans, size_t count, I32*,
                    const Totals& totals) {
  const uint8_t* codes = o.codes + spans->k / kChunk * 2 * 64 * bits;
  const int32_t* starts = o.starts;
  const size_t stride = o.stride;
  for (const Span* s = spans; s < spans + count; ++s, starts += tokens) {
    I32 high[tokens][2], low[tokens][2];
    expand<tokens>([&](auto c) LOWBIT_EXPANDED {
      high[c][0] = high[c][1] = zero_i32();
      low[c][0] = low[c][1] = set1_i32(starts[c]);
    });
    const int8_t* x[(tokens + 1) / 2][2];  // every second token's limbs
    expand<(tokens + 1) / 2>([&](auto i) LOWBIT_EXPANDED {
      x[i][0] = o.x + 2 * i * stride + s->k;
      x[i][1] = o.low + 2 * i * stride + s->k;
    });
    for (size_t k = s->k; k < s->end; k += kChunk) {
      U8 v[2][bits];
      expand<2 * bits>([&](auto i) LOWBIT_EXPANDED { v[i / bits][i % bits] = load_u8(codes + 64 * i); });
      expand<kSteps>([&](auto step) LOWBIT_EXPANDED {
        const U8 w0 = step_of<bits, map, step>(t, v[0]), w1 = step_of<bits, map, step>(t, v[1]);
        expand<tokens>([&](auto c) LOWBIT_EXPANDED {
          dot_pair<c % 2, 4 * step>(high[c], w0, w1, x[c / 2][0], stride);
          dot_pair<c % 2, 4 * step>(low[c], w0, w1, x[c / 2][1], stride);
        });
      });
      fetch<2 * bits>(o, codes, k / kChunk);
      codes += 2 * 64 * bits;
      expand<(tokens + 1) / 2>([&](auto i) LOWBIT_EXPANDED { x[i][0] += kChunk, x[i][1] += kChunk; });
    }
    expand<2 * tokens>([&](auto i) LOWBIT_EXPANDED {
      low[i / 2][i % 2] = add(shift_left<7>(high[i / 2][i % 2]), low[i / 2][i % 2]);
    });
    finish<tokens>(low, totals, *s);
  }
}

template <int bits, Map map, size_t... columns>
ColumnSums by_width(size_t width, std::index_sequence<columns...>) {
  constexpr ColumnSums all[] = {sums_of<bits, map, columns + 2>...};
  return all[width - 2];
}
template <int bits, Map map, size_t... tokens>
ColumnSums paired_by_width(size_t width, std::index_sequence<tokens...>) {
  constexpr ColumnSums all[] = {paired_sums_of<bits, map, tokens + 2>...};
  return all[width - 2];
}

template <int bits>
ColumnSums kernel(const CodeTerm& t, size_t columns) {
  constexpr auto widths = std::make_index_sequence<kMostColumns - 1>();
  if (t.map == Map::linear) return by_width<bits, Map::linear>(columns, widths);
  return by_width<bits, Map::table1>(columns, widths);
}
template <int bits>
ColumnSums paired_kernel(const CodeTerm& t, size_t tokens) {
  constexpr auto widths = std::make_index_sequence<kMostPaired - 1>();
  if (t.map == Map::linear) return paired_by_width<bits, Map::linear>(tokens, widths);
  return paired_by_width<bits, Map::table1>(tokens, widths);
}
#else
// Registers for a tile's sums are few here: a chunk is unpacked to bytes in the first-level cache, which
// every column then takes from there.
template <int bits, Map map>
void sums_of(const CodeTerm& t, const Columns& o, const Span* spans, size_t count, I32* out, const Totals&) {
  const uint8_t* codes = o.codes + spans->k / kChunk * 2 * 64 * bits;
  for (size_t i = 0; i < count; ++i, out += 2 * o.count) {
    for (size_t c = 0; c < o.count; ++c) out[2 * c] = out[2 * c + 1] = set1_i32(o.starts[i * o.count + c]);
    for (size_t k = spans[i].k; k < spans[i].end; k += kChunk) {
      U8 bytes[2][kSteps];
      unroll<2>([&](auto tile) LOWBIT_UNROLLED {
        unpack_codes<bits>(codes, bytes[tile]);
        if constexpr (map == Map::table1)
          unroll<kSteps>([&](auto step) LOWBIT_UNROLLED {
            bytes[tile][step] = lookup<bits>(t.high, bytes[tile][step]);
          });
        codes += 64 * bits;
      });
      fetch<2 * bits>(o, codes - 2 * 64 * bits, k / kChunk);
      for (size_t c = 0; c < o.count; ++c) {
        const int8_t* const x = o.x + c * o.stride + k;
        unroll<2>([&](auto tile) LOWBIT_UNROLLED {
          out[2 * c + tile] = dot_chunk<bits, map>(out[2 * c + tile], bytes[tile], x);
        });
      }
    }
  }
}

template <int bits>
ColumnSums kernel(const CodeTerm& t, size_t) {
  return t.map == Map::linear ? sums_of<bits, Map::linear> : sums_of<bits, Map::table1>;
}
template <int bits>
ColumnSums paired_kernel(const CodeTerm&, size_t) {
  return nullptr;  // never asked for: sums leave the registers between chunks
}
#endif

}  // namespace

namespace {

template <typename Choose>
ColumnSums by_bits(int bits, Choose choose) {
  switch (bits) {
    case 1:
      return choose(std::integral_constant<int, 1>());
    case 2:
      return choose(std::integral_constant<int, 2>());
    case 3:
      return choose(std::integral_constant<int, 3>());
    case 4:
      return choose(std::integral_constant<int, 4>());
    case 5:
      return choose(std::integral_constant<int, 5>());
    case 6:
      return choose(std::integral_constant<int, 6>());
    case 7:
      return choose(std::integral_constant<int, 7>());
    default:
      return choose(std::integral_constant<int, 8>());
  }
}

}  // namespace

ColumnSums column_sums(const CodeTerm& t, size_t columns) {
  return by_bits(t.bits, [&](auto bits) { return kernel<bits>(t, columns); });
}

ColumnSums paired_sums(const CodeTerm& t, size_t tokens) {
  return by_bits(t.bits, [&](auto bits) { return paired_kernel<bits>(t, tokens); });
}

}  // namespace lowbit::LOWBIT_ISA
