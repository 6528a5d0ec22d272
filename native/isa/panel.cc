// Unpacks a block of 32 rows of a code term to signed bytes for the product of many tokens (panel.h). Done
// once per block, so its cost fades with the number of tokens; what matters is that nothing but dot products
// is left to do for each of them.
#include <algorithm>

#include "decode.h"
#include "matmul_kernels.h"
#include "panel.h"
#include "simd/signed_dot.h"

namespace lowbit::LOWBIT_ISA {

void unpack_panel(const CodeTerm& t, size_t block, size_t chunks, uint8_t* memory);

namespace {

struct Range {
  int low, high;
};

// The integer levels of the codes, and tables of them as signed bytes where codes are looked up.
struct Levels {
  bool lookup;
  Range range[2];  // of each limb
  alignas(64) uint8_t table[2][256];
};

void find_levels(const CodeTerm& t, Levels* levels) {
  levels->lookup = t.map != Map::linear || t.step != 1;
  if (t.map == Map::linear) {
    const int last = t.base + t.step * ((t.count ? t.count : 1 << t.bits) - 1);
    levels->range[0] = {std::min(t.base, last), std::max(t.base, last)};
    for (int code = 0; code < 256; ++code)
      levels->table[0][code] =
          static_cast<uint8_t>(t.base + t.step * code);  // not used where one does not fit
    return;
  }
  for (size_t limb = 0; limb < 2; ++limb) {
    const uint8_t* table = limb ? t.low : t.high;
    for (int code = 0; code < 256; ++code) levels->table[limb][code] = table[code] ^ 0x80;
    const auto found = std::minmax_element(table, table + 256);
    levels->range[limb] = {*found.first - 128, *found.second - 128};
  }
}

Range zero_point_range(const CodeTerm& t, size_t block) {
  if (!t.zero_points) return {0, 0};
  const uint8_t* first = t.zero_points + block * t.groups * kBlockRows;
  const auto found = std::minmax_element(first, first + t.groups * kBlockRows);
  return {*found.first, *found.second};
}

// Eight steps of a tile as bytes: codes read in either stored form. Codes come from memory in long rows, so
// they are fetched ahead as in gemv.cc.
constexpr size_t kAhead = 4096;

template <int bits>
struct Codes {
  Codes(const CodeTerm& t, size_t block, size_t chunks) : p(t.codes + block * code_block_bytes(t, chunks)) {}
  LOWBIT_INLINE void next(size_t, size_t, U8 (&out)[kSteps]) {
    unpack_codes<bits>(p, out);
    for (size_t line = 0; line < static_cast<size_t>(bits); ++line)
      __builtin_prefetch(p + kAhead + 64 * line, 0, 3);
    p += 64 * bits;
  }
  const uint8_t* p;
};

struct TritTables {
  alignas(64) uint8_t digit[kTritSteps][256];
};
constexpr TritTables make_trit_tables() {
  TritTables tables = {};
  for (int byte = 0; byte < 256; ++byte)
    for (size_t place = 0; place < kTritSteps; ++place)
      tables.digit[place][byte] = trits_of(static_cast<uint8_t>(byte)).codes[place];
  return tables;
}
constexpr TritTables kTritTables = make_trit_tables();

struct Base3Codes {
  Base3Codes(const CodeTerm& t, size_t block, size_t chunks)
      : p(t.codes + block * code_block_bytes(t, chunks)), vectors(t.vectors) {}
  void next(size_t chunk, size_t tile, U8 (&out)[kSteps]) {
    for (size_t s = 0; s < kSteps; ++s) {
      const size_t step = chunk * kSteps + s, vector = step / kTritSteps;
      const uint8_t* const at = p + vector * 128 + tile * 64;
      __builtin_prefetch(at + kAhead, 0, 3);
      out[s] = vector < vectors ? lookup256(kTritTables.digit[step % kTritSteps], load_u8(at)) : set1_u8(1);
    }
  }
  const uint8_t* p;
  size_t vectors;
};

// What the bytes of a row become in 16 inputs that share everything.
struct RowBytes {
  U8 selector, add, multiplier;
};

// On top of a looked-up level, or of the code.
U8 common_addend(const CodeTerm& t, bool wide) {
  if (t.map != Map::linear) return set1_u8(0);
  if (wide) return set1_u8(t.bits == 8 ? 128 : 0);
  return set1_u8(static_cast<uint8_t>(t.step == 1 ? t.base : 0));
}

LOWBIT_INLINE RowBytes row_bytes(const CodeTerm& t, bool wide, U8 addend, size_t block, size_t tile,
                                 size_t k) {
  RowBytes rows = {};
  const size_t group = std::min(k / t.group_size, t.groups - 1);
  const size_t index = (block * t.groups + group) * kBlockRows + tile * kTileRows;
  if (t.selectors) rows.selector = shift_left<4>(spread_rows(t.selectors + index));
  rows.add = addend;
  if (t.zero_points && !wide) rows.add = sub_bytes(addend, spread_rows(t.zero_points + index));
  if (t.multipliers) {
    const size_t at = std::min(k / t.multiplier_size, t.multiplier_groups - 1);
    const U8 pairs = spread_rows(t.multipliers + (block * t.multiplier_groups + at) * kTileRows);
    rows.multiplier = tile ? shift_right<4>(pairs) : and_(pairs, set1_u8(0x0f));
  }
  return rows;
}

// Ends of segments, chunk by chunk.
class SegmentEnds {
 public:
  SegmentEnds(const CodeTerm& t, size_t padded)
      : group_size_(t.group_size),
        padded_(padded),
        group_end_(t.group_size),
        stop_(t.groups * t.group_size),
        end_(segment_end(0, group_end_, stop_)) {}
  // Whether a segment ends at k, a multiple of 16 that rises from call to call. The padding that follows the
  // last group, half a chunk, closes a segment that nobody reads.
  bool closes(size_t k) {
    if (k != end_) return false;
    if (end_ == group_end_) group_end_ += group_size_;
    end_ = end_ == stop_ ? padded_ : segment_end(end_, group_end_, stop_);
    return true;
  }

 private:
  size_t group_size_, padded_, group_end_, stop_, end_;
};

// `rows`: what to add, to select or to multiply differs from row to row.
template <int bits, bool limbs, bool lookups, bool rows, typename Source>
void fill(const CodeTerm& t, size_t block, size_t chunks, const Levels& levels, const Panel& panel) {
  const bool wide = panel.head->wide;
  const U8 addend = common_addend(t, wide);
  Source source(t, block, chunks);
  SegmentEnds ends(t, chunks * kChunk);
  I32 sums[2][limbs + 1];  // [tile][limb]
  unroll<2 * (limbs + 1)>([&](auto i) LOWBIT_UNROLLED { sums[i % 2][i / 2] = zero_i32(); });
  size_t segment = 0;
  for (size_t c = 0; c < chunks; ++c) {
    const bool middle = ends.closes(c * kChunk + 16), end = ends.closes(c * kChunk + 32);
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      U8 codes[kSteps];
      source.next(c, tile, codes);
      size_t at = segment;
      unroll<2>([&](auto half) LOWBIT_UNROLLED {
        RowBytes row = {};
        if constexpr (rows) row = row_bytes(t, wide, addend, block, tile, c * kChunk + half * 16);
        I32 part[limbs + 1];  // a chain of its own for each half: one over all steps would be waited for
        unroll<limbs + 1>([&](auto limb) LOWBIT_UNROLLED { part[limb] = zero_i32(); });
        unroll<4>([&](auto i) LOWBIT_UNROLLED {
          const size_t s = half * 4 + i;
          const size_t step = (c * kSteps + s) * 128 + tile * 64;
          U8 level[limbs + 1] = {codes[s]};
          if constexpr (lookups) {
            U8 code = codes[s];
            if (rows && t.selectors) {
              code = or_(code, row.selector);
              level[0] = lookup64(levels.table[0], code);
              if constexpr (limbs) level[1] = lookup64(levels.table[1], code);
            } else {
              level[0] = lookup<bits>(levels.table[0], code);
              if constexpr (limbs) level[1] = lookup<bits>(levels.table[1], code);
            }
          }
          if constexpr (!lookups || rows) level[limbs] = add_bytes(level[limbs], rows ? row.add : addend);
          if constexpr (rows) {
            if (t.multipliers) level[limbs] = mul_bytes(level[limbs], row.multiplier);
          }
          unroll<limbs + 1>([&](auto limb) LOWBIT_UNROLLED {
            store_u8(reinterpret_cast<uint8_t*>(panel.weights[limb]) + step, level[limb]);
            part[limb] = sum_signed(part[limb], level[limb]);
          });
        });
        unroll<limbs + 1>([&](auto limb)
                              LOWBIT_UNROLLED { sums[tile][limb] = add(sums[tile][limb], part[limb]); });
        if (half ? end : middle) {
          unroll<limbs + 1>([&](auto limb) LOWBIT_UNROLLED {
            store_i32(panel.starts[limb] + at * kBlockRows + tile * kTileRows,
                      shift_left<7>(sub(zero_i32(), sums[tile][limb])));
            sums[tile][limb] = zero_i32();
          });
          ++at;
        }
      });
    });
    segment += static_cast<size_t>(middle) + static_cast<size_t>(end);
  }
}

template <int bits, bool limbs, bool lookups, typename Source>
void fill_rows(const CodeTerm& t, size_t block, size_t chunks, const Levels& levels, const Panel& panel) {
  if (t.selectors || t.zero_points || t.multipliers)
    return fill<bits, limbs, lookups, true, Source>(t, block, chunks, levels, panel);
  fill<bits, limbs, lookups, false, Source>(t, block, chunks, levels, panel);
}

template <int bits, typename Source = Codes<bits>>
void fill_any(const CodeTerm& t, size_t block, size_t chunks, const Levels& levels, const Panel& panel) {
  if (t.map == Map::table2) return fill_rows<bits, true, true, Source>(t, block, chunks, levels, panel);
  if (levels.lookup && !(panel.head->wide && t.map == Map::linear))
    return fill_rows<bits, false, true, Source>(t, block, chunks, levels, panel);
  fill_rows<bits, false, false, Source>(t, block, chunks, levels, panel);
}

}  // namespace

void unpack_panel(const CodeTerm& t, size_t block, size_t chunks, uint8_t* memory) {
  Panel panel;
  lay_out_panel(t, chunks * kChunk, memory, &panel);
  Levels levels;
  find_levels(t, &levels);
  const size_t last = t.map == Map::table2 ? 1 : 0;  // the limb that zero points change
  const Range zero = zero_point_range(t, block), level = levels.range[last];
  Range range = {level.low - zero.high, level.high - zero.low};
  Panel::Head& head = *panel.head;
  head.wide = range.low < -128 || range.high > 127;
  head.step = t.map == Map::linear ? t.step : 1;
  if (head.wide) range = level;
  if (head.wide && t.map == Map::linear) range = {t.bits == 8 ? -128 : 0, (1 << t.bits) - 1};
  if (last) range = {std::min(range.low, levels.range[0].low), std::max(range.high, levels.range[0].high)};
  if (t.multipliers) range = {15 * range.low, 15 * range.high};
  head.peak = std::max(-range.low, range.high);
  for (size_t group = 0; group < t.groups; ++group)
    for (size_t tile = 0; tile < 2; ++tile) {
      const size_t at = group * kBlockRows + tile * kTileRows, index = block * t.groups * kBlockRows + at;
      store(panel.scales + at, group_scale(t, block, group, tile * kTileRows));
      if (t.offsets) store(panel.offsets + at, group_offset(t, block, group, tile * kTileRows));
      if (!head.wide) continue;
      const int base = t.map == Map::linear ? t.base + (t.bits == 8 ? 128 * t.step : 0) : 0;
      I32 correction = set1_i32(base);
      if (t.zero_points) correction = sub(correction, load_u8_i32(t.zero_points + index));
      store_i32(panel.corrections + at, correction);
    }
  if (t.base3) return fill_any<2, Base3Codes>(t, block, chunks, levels, panel);
  switch (t.bits) {
    case 1:
      return fill_any<1>(t, block, chunks, levels, panel);
    case 2:
      return fill_any<2>(t, block, chunks, levels, panel);
    case 3:
      return fill_any<3>(t, block, chunks, levels, panel);
    case 4:
      return fill_any<4>(t, block, chunks, levels, panel);
    case 5:
      return fill_any<5>(t, block, chunks, levels, panel);
    case 6:
      return fill_any<6>(t, block, chunks, levels, panel);
    case 7:
      return fill_any<7>(t, block, chunks, levels, panel);
    default:
      return fill_any<8>(t, block, chunks, levels, panel);
  }
}

}  // namespace lowbit::LOWBIT_ISA
