// One token times blocks of codes, decoded in registers: decode is bound by memory, so nothing is written
// back between the packed weights and the sums of a segment.
#include "gemv.h"

namespace lowbit::LOWBIT_ISA {

void gemv(const CodeTerm& t, size_t block, size_t blocks, const Activations& a, size_t token, float* acc,
          float* scales);

namespace {

template <Map map, int limbs, bool plain>
void gemv_of(const CodeTerm& t, size_t block, size_t blocks, const Activations& a, size_t token, float* acc,
             float* scales) {
  constexpr int weight_limbs = kWeightLimbs<map>;
  const SegmentSums sums_of = segment_sums(t, limbs);
  const Runs runs = runs_of(t);
  const size_t padded = a.padded, stop = t.groups == 1 ? padded : t.groups * t.group_size;
  const size_t block_bytes = code_block_bytes(t, padded / kChunk);
  // What sums start from, see start() in decode.h; segments with multipliers do their own.
  const bool lowered = kSignedBytes && (map != Map::linear || t.bits == 8);
  const int32_t base = t.multipliers ? 0
                                     : (lowered ? 128 : 0) + (map != Map::linear ? -128
                                                              : plain            ? t.base
                                                                                 : 0);
  Segment segment = {};
  segment.high = a.high + token * padded;
  segment.low = limbs == 2 ? a.low + token * padded : nullptr;
  segment.sums = a.sums + token * (padded / kSumStride + 1);
  for (const size_t last_block = block + blocks; block < last_block; ++block, acc += kBlockRows) {
    block_scales(t, block, scales);
    segment.codes = t.codes + block * block_bytes;
    if (t.multipliers) segment.multipliers = t.multipliers + block * t.multiplier_groups * kTileRows;
    F32 f[2] = {load(acc), load(acc + kTileRows)};
    // A run starts from -0: multiplying and adding to it is multiplying alone.
    F32 run[2] = {set1(-0.0f), set1(-0.0f)};
    size_t group = 0, group_end = t.group_size;
    for (size_t k = 0; k < stop;) {
      const size_t end = segment_end(k, group_end, stop);
      const SegmentScale s = segment_scale(a, token, k, end);
      const size_t first = block * t.groups * kBlockRows + group * kBlockRows;
      if (t.selectors) segment.selectors = t.selectors + first;
      segment.k = k;
      segment.end = end;
      segment.start = base * s.sum;
      I32 dot[2][weight_limbs][limbs];
      sums_of(t, segment, &dot[0][0][0]);
      const bool last = runs.last(end, group_end, stop);
      unroll<2>([&](auto tile) LOWBIT_UNROLLED {
        TileScale w = {};
        w.scale = load(scales + group * kBlockRows + tile * kTileRows);
        if constexpr (!plain) {
          if (t.zero_points) w.zero_point = load_u8_i32(t.zero_points + first + tile * kTileRows);
          if (t.offsets) w.offset = load_number(t.offset_type, t.offsets, first + tile * kTileRows);
        }
        add_total<plain>(f[tile], run[tile], segment_total<map, plain>(dot[tile], t, w, s), false, last,
                         runs.weights_outer, t, w, s);
        if (last) run[tile] = set1(-0.0f);
      });
      if (end == group_end) {
        ++group;
        group_end += t.group_size;
      }
      k = end;
    }
    store(acc, f[0]);
    store(acc + kTileRows, f[1]);
  }
}

template <Map map, bool plain>
Gemv gemv_of(int limbs) {
  return limbs == 2 ? gemv_of<map, 2, plain> : gemv_of<map, 1, plain>;
}

Gemv kernel(const CodeTerm& t, int limbs) {
  if (const Gemv fast = fast_gemv(t, limbs)) return fast;
  if (t.map == Map::table1) return gemv_of<Map::table1, false>(limbs);
  if (t.map == Map::table2) return gemv_of<Map::table2, false>(limbs);
  return is_plain(t) ? gemv_of<Map::linear, true>(limbs) : gemv_of<Map::linear, false>(limbs);
}

}  // namespace

void gemv(const CodeTerm& t, size_t block, size_t blocks, const Activations& a, size_t token, float* acc,
          float* scales) {
  kernel(t, a.limbs)(t, block, blocks, a, token, acc, scales);
}

}  // namespace lowbit::LOWBIT_ISA
