// Two tokens to a few dozen times blocks of codes, decoded in registers as for one (gemv.cc) but once for a
// whole tile of tokens. A dot product waits for the one before it in the same sum, so for one token most of
// its time is idle, and three more tokens cost little; from four on the dot products themselves count.
#include "few.h"

#include <algorithm>

#include "matmul_kernels.h"
#include "gemv.h"

namespace lowbit::LOWBIT_ISA {

void few(const CodeTerm& t, size_t block, size_t blocks, const Activations& a, float* acc, uint8_t* scratch);

namespace {

// Segments whose sums lie in the first-level cache between the integers and the floats.
constexpr size_t kBatch = 64 / kMostColumns;
// Tiles that share a block are one token narrower than a tile alone: two of eight are 3% slower than three.
constexpr size_t kMostShared = kFinishes ? kMostColumns - 1 : kMostColumns;

// A tile of tokens at hand.
struct Tile {
  size_t first, count;
};

struct Scratch {
  float* scales;    // of the block, then its offsets
  Span* spans;      // of a row
  int32_t* starts;  // [tile][span][token], the same for all blocks
  uint8_t* planes;  // base 3 only: the block's
};

Scratch lay_out(const CodeTerm& t, size_t padded, uint8_t* p) {
  Scratch s = {};
  s.scales = reinterpret_cast<float*>(p);
  p += float_scale_bytes(t);
  s.spans = reinterpret_cast<Span*>(p);
  p += padded / kChunk * kSegmentBytes;
  if (t.base3) {
    s.planes = p;
    p += padded / kChunk * 2 * 128;
  }
  s.starts = reinterpret_cast<int32_t*>(p);
  return s;
}

size_t cut(const CodeTerm& t, size_t padded, Span* spans) {
  const Runs runs = runs_of(t);
  size_t count = 0, group = 0, group_end = t.group_size;
  for (size_t k = 0, end; k < padded; k = end, ++count) {
    end = segment_end(k, group_end, padded);
    spans[count] = {k, end, group, runs.first(k, group_end - t.group_size),
                    runs.last(end, group_end, padded)};
    if (end == group_end) {
      ++group;
      group_end += t.group_size;
    }
  }
  return count;
}

// What sums start from, see start() in decode.h: those of the low or only limb.
void find_starts(int32_t base, const Activations& a, const Tile& tile, const Span* spans, size_t count,
                 int32_t* starts) {
  for (size_t token = 0; token < tile.count; ++token) {
    const int32_t* const sums = a.sums + (tile.first + token) * (a.padded / kSumStride + 1);
    for (size_t i = 0; i < count; ++i)
      starts[i * tile.count + token] =
          base * (sums[spans[i].end / kSumStride] - sums[spans[i].k / kSumStride]);
  }
}

// The sums of a batch of segments, [segment][token][tile].
struct Batch {
  const Span* spans;
  size_t count;
  const I32* sums[2];  // of each limb
};

// They go into acc[token][32] and the runs that are open, [token][32] too. Whatever decides the order of
// scales is a constant here: GCC keeps both of them in memory where it is not, which costs more than the
// rest.
template <Map map, int limbs, bool plain, bool weights_outer>
void add_sums(const CodeTerm& t, size_t block, const float* scales, const Activations& a, const Tile& tile,
              const Batch& batch, float* acc, float* open) {
  const Span* const stop = batch.spans + batch.count;
  for (size_t token = 0; token < tile.count; ++token, acc += kBlockRows, open += kBlockRows) {
    F32 f[2] = {load(acc), load(acc + kTileRows)}, run[2] = {load(open), load(open + kTileRows)};
    size_t from = 2 * token;
    for (const Span* span = batch.spans; span != stop; ++span, from += 2 * tile.count) {
      const SegmentScale s = segment_scale(a, tile.first + token, span->k, span->end);
      const bool last = span->last;
      unroll<2>([&](auto half) LOWBIT_UNROLLED {
        const size_t at = span->group * kBlockRows + half * kTileRows;
        TileScale w = {};
        w.scale = load(scales + at);
        if constexpr (!plain) {
          if (t.zero_points) w.zero_point = load_u8_i32(t.zero_points + block * t.groups * kBlockRows + at);
          if (t.offsets) w.offset = load(scales + t.groups * kBlockRows + at);
        }
        I32 dot[1][limbs];
        unroll<limbs>([&](auto limb) LOWBIT_UNROLLED { dot[0][limb] = batch.sums[limb][from + half]; });
        // A run starts from -0: multiplying and adding to it is multiplying alone.
        add_total<plain>(f[half], run[half], segment_total<map, plain>(dot, t, w, s), false, last,
                         weights_outer, t, w, s);
        if (last) run[half] = set1(-0.0f);
      });
    }
    store(acc, f[0]), store(acc + kTileRows, f[1]);
    store(open, run[0]), store(open + kTileRows, run[1]);
  }
}

using AddSums = void (*)(const CodeTerm&, size_t, const float*, const Activations&, const Tile&, const Batch&,
                         float*, float*);

template <Map map, bool plain>
AddSums adder(int limbs, bool weights_outer) {
  if (limbs == 2) return weights_outer ? add_sums<map, 2, plain, true> : add_sums<map, 2, plain, false>;
  return weights_outer ? add_sums<map, 1, plain, true> : add_sums<map, 1, plain, false>;
}

AddSums adder_of(const CodeTerm& t, int limbs) {
  const bool outer = runs_of(t).weights_outer;
  if (is_plain(t)) return adder<Map::linear, true>(limbs, outer);  // whatever its levels are
  return t.map == Map::linear ? adder<Map::linear, false>(limbs, outer)
                              : adder<Map::table1, false>(limbs, outer);
}

}  // namespace

void few(const CodeTerm& t, size_t block, size_t blocks, const Activations& a, float* acc, uint8_t* scratch) {
  static_assert(sizeof(Span) <= kSegmentBytes, "few_scratch_bytes() has to grow");
  const size_t padded = a.padded, chunks = padded / kChunk, block_bytes = code_block_bytes(t, chunks);
  const Scratch memory = lay_out(t, padded, scratch);
  const size_t count = cut(t, padded, memory.spans);
  const AddSums add = adder_of(t, a.limbs);
  const bool paired = kFinishes && a.limbs == 2 && is_plain(t);
  const int32_t lowered = kSignedBytes && (t.map != Map::linear || t.bits == 8) ? 128 : 0;
  const int32_t base = lowered + (t.map != Map::linear ? -128 : is_plain(t) ? t.base : 0);
  const int32_t zeros[kBatch * kMostColumns] = {};
  I32 sums[2][kBatch * kMostColumns * 2];
  float open[kMostColumns * kBlockRows];
  for (size_t b = 0; b < blocks; ++b) {
    block_scales(t, block + b, memory.scales);
    if (t.offsets) block_offsets(t, block + b, memory.scales + t.groups * kBlockRows);
    const uint8_t* codes = t.codes + (block + b) * block_bytes;
    if (t.base3) {
      base3_planes(t, codes, chunks, memory.planes);
      codes = memory.planes;
    }
    // Codes that are read once come straight to the first-level cache. Otherwise those of the next block are
    // asked for while this one's are multiplied, in equal parts by all tiles.
    const size_t most = paired ? kMostPaired : kMostColumns, shared = paired ? kMostPaired : kMostShared;
    const size_t tiles = a.tokens <= most ? 1 : (a.tokens + shared - 1) / shared;
    const bool once = tiles == 1 && !t.base3;
    const size_t lines = (block_bytes / 64 + chunks * tiles - 1) / (chunks * tiles);
    const uint8_t* ahead = once ? nullptr : t.codes + (block + b + 1) * block_bytes;
    Tile tile = {0, 0};
    for (size_t left = tiles; left; --left) {
      tile.count = (a.tokens - tile.first + left - 1) / left;
      int32_t* const starts = memory.starts + tile.first * count;
      if (b == 0) find_starts(base, a, tile, memory.spans, count, starts);
      const ColumnSums sums_of = paired ? paired_sums(t, tile.count) : column_sums(t, tile.count);
      for (size_t i = 0; i < tile.count * kBlockRows; i += kTileRows) store(open + i, set1(-0.0f));
      const auto next = [&] {
        tile.first += tile.count;
        if (ahead) ahead += chunks * lines * 64;
      };
      float* const out = acc + (b * a.tokens + tile.first) * kBlockRows;
      const Totals totals = {
          runs_of(t).weights_outer, memory.scales, a.scales + tile.first * a.groups, a.groups, out, open};
      if (paired || (kFinishes && a.limbs == 1 && is_plain(t))) {
        const size_t from = tile.first * padded;
        const Columns columns = {codes,  a.high + from, padded, tile.count,
                                 starts, ahead,         lines,  paired ? a.low + from : nullptr};
        sums_of(t, columns, memory.spans, count, nullptr, totals);
        next();
        continue;
      }
      for (size_t from = 0; from < count; from += kBatch) {
        const Batch batch = {memory.spans + from, std::min(kBatch, count - from), {sums[0], sums[1]}};
        for (int limb = 0; limb < a.limbs; ++limb) {
          const int8_t* const x = (limb ? a.low : a.high) + tile.first * padded;
          const int32_t* const begin = limb + 1 == a.limbs ? starts + from * tile.count : zeros;
          sums_of(t, {codes, x, padded, tile.count, begin, ahead, lines, nullptr}, batch.spans, batch.count,
                  sums[limb], totals);
        }
        add(t, block + b, memory.scales, a, tile, batch, out, open);
      }
      next();
    }
  }
}

}  // namespace lowbit::LOWBIT_ISA
