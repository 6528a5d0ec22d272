// One token times blocks of codes, decoded in registers: decode is bound by memory, so nothing is written
// back between the packed weights and the sums of a segment.
#include "gemv.h"

#include "matmul_kernels.h"
#include "table.h"

namespace lowbit::LOWBIT_ISA {

void gemv(const CodeTerm& t, size_t block, size_t blocks, const Activations& a, size_t token, float* acc,
          uint8_t* scratch);

namespace {

bool takes_table(const CodeTerm& t, const Activations& a) {
  return (a.table_widths >> t.bits & 1) != 0 && has_table(t);
}

// Segments whose sums lie in the first-level cache between the integers and the floats.
constexpr size_t kBatch = 16;

// Cuts a row into segments, the same for every block. Returns how many there are.
template <Map map, bool plain>
size_t cut(const CodeTerm& t, const Activations& a, size_t token, Segment* segments) {
  const Runs runs = runs_of(t);
  const size_t stop = t.groups == 1 ? a.padded : t.groups * t.group_size;
  // What sums start from: see start() in decode.h; segments with multipliers do their own.
  const int32_t lowered = kSignedBytes && (map != Map::linear || t.bits == 8) ? 128 : 0;
  int32_t base = lowered + (map != Map::linear ? -128 : plain ? t.base : 0);
  if (t.multipliers) base = 0;
  size_t count = 0, group = 0, group_end = t.group_size;
  for (size_t k = 0, end; k < stop; k = end, ++count) {
    end = segment_end(k, group_end, stop);
    const SegmentScale s = segment_scale(a, token, k, end);
    segments[count] = {k, end, group, base * s.sum, runs.last(end, group_end, stop), s};
    if (end == group_end) {
      ++group;
      group_end += t.group_size;
    }
  }
  return count;
}

template <Map map, int limbs, bool plain>
void gemv_of(const CodeTerm& t, size_t block, size_t blocks, const Activations& a, size_t token, float* acc,
             uint8_t* scratch) {
  constexpr int weight_limbs = kWeightLimbs<map>;
  const SegmentSums sums_of = takes_table(t, a) ? table_sums(t, limbs) : segment_sums(t, limbs);
  const bool weights_outer = runs_of(t).weights_outer;
  const size_t block_bytes = code_block_bytes(t, a.padded / kChunk);
  float* const scales = reinterpret_cast<float*>(scratch);
  float* const offsets = scales + t.groups * kBlockRows;
  Segment* const segments = reinterpret_cast<Segment*>(offsets + (t.offsets ? t.groups * kBlockRows : 0));
  const size_t count = cut<map, plain>(t, a, token, segments);
  Operands o = {};
  o.tables = a.tables;
  o.chunks = a.padded / kChunk;
  o.high = a.high + token * a.padded;
  o.low = limbs == 2 ? a.low + token * a.padded : nullptr;
  o.sums = a.sums + token * (a.padded / kSumStride + 1);
  for (const size_t last_block = block + blocks; block < last_block; ++block, acc += kBlockRows) {
    block_scales(t, block, scales);
    if constexpr (!plain)
      if (t.offsets) block_offsets(t, block, offsets);
    o.codes = t.codes + block * block_bytes;
    if (t.selectors) o.selectors = t.selectors + block * t.groups * kBlockRows;
    if (t.multipliers) o.multipliers = t.multipliers + block * t.multiplier_groups * kTileRows;
    F32 f[2] = {load(acc), load(acc + kTileRows)};
    // A run starts from -0: multiplying and adding to it is multiplying alone.
    F32 run[2] = {set1(-0.0f), set1(-0.0f)};
    for (size_t first = 0; first < count; first += kBatch) {
      I32 dot[kBatch][2][weight_limbs][limbs];
      const size_t batch = count - first < kBatch ? count - first : kBatch;
      sums_of(t, o, segments + first, batch, &dot[0][0][0][0]);
      for (size_t i = 0; i < batch; ++i) {
        const Segment& s = segments[first + i];
        unroll<2>([&](auto tile) LOWBIT_UNROLLED {
          const size_t at = s.group * kBlockRows + tile * kTileRows;
          TileScale w;  // GCC clears it with `rep stos`, 30 cycles, if asked to
          w.scale = load(scales + at);
          if constexpr (!plain) {
            if (t.zero_points) w.zero_point = load_u8_i32(t.zero_points + block * t.groups * kBlockRows + at);
            if (t.offsets) w.offset = load(offsets + at);
          }
          add_total<plain>(f[tile], run[tile], segment_total<map, plain>(dot[i][tile], t, w, s.scale), false,
                           s.last, weights_outer, t, w, s.scale);
          if (s.last) run[tile] = set1(-0.0f);
        });
      }
    }
    store(acc, f[0]);
    store(acc + kTileRows, f[1]);
  }
}

template <Map map, bool plain>
Gemv gemv_of(int limbs) {
  return limbs == 2 ? gemv_of<map, 2, plain> : gemv_of<map, 1, plain>;
}

Gemv kernel(const CodeTerm& t, const Activations& a) {
  const int limbs = a.limbs;
  const Gemv fast = takes_table(t, a) ? nullptr : fast_gemv(t, limbs);
  if (fast) return fast;
  if (t.map == Map::table1) return gemv_of<Map::table1, false>(limbs);
  if (t.map == Map::table2) return gemv_of<Map::table2, false>(limbs);
  return is_plain(t) ? gemv_of<Map::linear, true>(limbs) : gemv_of<Map::linear, false>(limbs);
}

}  // namespace

void gemv(const CodeTerm& t, size_t block, size_t blocks, const Activations& a, size_t token, float* acc,
          uint8_t* scratch) {
  static_assert(sizeof(Segment) <= kSegmentBytes, "gemv_scratch_bytes() has to grow");
  kernel(t, a)(t, block, blocks, a, token, acc, scratch);
}

}  // namespace lowbit::LOWBIT_ISA
