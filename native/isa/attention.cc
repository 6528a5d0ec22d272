// Attention of a tile of queries over one segment of 16-bit keys, and how segments are folded.
//
// A query walks the keys of a segment in blocks of 64 at fixed positions, see attention_block.h. So one query
// alone gives the same bits as a tile of many, and segments can be computed apart and merged in order.
#include "attention_block.h"

namespace lowbit::LOWBIT_ISA {
namespace {

void attend(const AttentionTile& t, const uint16_t* keys, const uint16_t* values, size_t segment,
            const AttentionState& state, float* scratch) {
  clear_state(t, state);
  const size_t end = t.position + (t.rows - 1) / t.group + 1;  // positions that the last query sees
  const size_t begin = t.window && t.position + 1 > t.window ? t.position + 1 - t.window : 0;
  for (size_t block = segment; block < segment + kSegment && block < end; block += kAttentionBlock) {
    if (block + kAttentionBlock <= begin) continue;
    const uint16_t* k = keys + (block - segment) * t.head_dim;
    const uint16_t* v = values + (block - segment) * t.stride;
    // Fetching ahead never faults, so the address after the last segment may point anywhere.
    const bool leaves = block + kAttentionBlock == segment + kSegment;
    const uint16_t* next_k = leaves ? keys + t.segment_step : k + kAttentionBlock * t.head_dim;
    const uint16_t* next_v = leaves ? values + t.segment_step : v + kAttentionBlock * t.stride;
    if (t.rows <= 2 * kRows) {
      attend_block(t, Block<uint16_t>{block, k, v, next_k, next_v}, state);
    } else {  // many rows read the block: widen it once
      const size_t seen = end - block < kAttentionBlock ? end - block : kAttentionBlock;
      float* wide_values = scratch + kAttentionBlock * t.head_dim;
      widen(k, (seen + kKeyLanes - 1) / kKeyLanes * kKeyLanes * t.head_dim, scratch);
      widen(v, seen * t.stride, wide_values);
      attend_block(t, Block<float>{block, scratch, wide_values, scratch, wide_values}, state);
    }
  }
}

void merge(size_t rows, size_t stride, float unit, const AttentionState& total, const AttentionState& part) {
  alignas(64) float old[16], now[16];
  for (size_t first = 0; first < rows; first += 16) {
    const size_t count = rows - first < 16 ? rows - first : 16;
    fold_sums(count, {total.peak + first, total.sum + first, nullptr},
              {part.peak + first, part.sum + first, nullptr}, unit, old, now);
    for (size_t r = 0; r < count; ++r) {
      float* x = total.mixed + (first + r) * stride;
      const float* y = part.mixed + (first + r) * stride;
      for (size_t d = 0; d < stride; d += 16) store(x + d, fold(load(x + d), load(y + d), old[r], now[r]));
    }
  }
}

void add_sink(const AttentionState& total, size_t row, size_t stride, float unit, float level, float score) {
  const float peak = total.peak[row] * unit, next = peak > score ? peak : score;
  alignas(64) float weights[16] = {peak - next, score - next};
  store(weights, exponential(load(weights)));
  total.sum[row] = total.sum[row] * weights[0] + level * weights[1];
  float* x = total.mixed + row * stride;
  for (size_t d = 0; d < stride; d += 16) store(x + d, mul(load(x + d), set1(weights[0])));
}

void finish(const AttentionState& total, size_t row, size_t head_dim, size_t stride, float* out) {
  const F32 inverse = set1(1.0f / total.sum[row]);
  const float* x = total.mixed + row * stride;
  for (size_t d = 0; d < head_dim; d += 16) {
    // Skipped keys may leave zeros of either sign; adding +0 makes them one.
    const F32 v = add(mul(load(x + d), inverse), zero_f32());
    if (d + 16 <= head_dim)
      store(out + d, v);
    else
      store_n(out + d, v, head_dim - d);
  }
}

}  // namespace

void add_attention_kernels(DecoderKernels& table) {
  table.attend = attend;
  table.merge = merge;
  table.add_sink = add_sink;
  table.finish = finish;
}

}  // namespace lowbit::LOWBIT_ISA
