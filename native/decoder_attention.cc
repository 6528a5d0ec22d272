// Keys and values into the cache, and attention over it, by one member of a pass.
#include "decoder_step.h"

#include <algorithm>

namespace lowbit {
namespace {

const float* offset_or_null(const std::vector<float>& v, size_t offset) {
  return v.empty() ? nullptr : v.data() + offset;
}

}  // namespace

// What queries and keys of a row have in common.
HeadPreparation Walk::preparation(size_t layer, size_t row) const {
  HeadPreparation p = {};
  p.head_dim = spec_.head_dim;
  p.norm_eps = spec_.norm_eps;
  p.half = spec_.rotary_dim / 2;
  if (decoder_.layer(layer).rotates) {
    p.cosine = lane_.rotation.get() + row * w_.rotation_stride();
    if (decoder_.layer(layer).local) p.cosine += spec_.rotary_dim;
    p.sine = p.cosine + p.half;
  }
  p.scale = 1;
  return p;
}

// Stores key and value of one token and head.
void Walk::append(size_t index, const Slice& slice, size_t query, size_t kv_head) {
  const DecoderLayer& layer = decoder_.layer(index);
  const size_t dim = spec_.head_dim, q = spec_.q_size(), kv = spec_.kv_size();
  const size_t row = slice.row + query, position = slice.position + query;
  const float* projected = w_.qkv_ + row * w_.qkv_stride_ + q + kv_head * dim;
  HeadPreparation p = preparation(index, row);
  if (!spec_.qk_norm_whole) {
    p.bias = offset_or_null(layer.k_bias, kv_head * dim);
    p.norm = offset_or_null(layer.k_norm, 0);
  }
  float* key = w_.attention_scratch_[member_.id].get();
  kernels_.prepare_head(p, projected, key);
  const size_t segment = position / kSegment, stride = spec_.kv_shape().value_stride();
  const float* bias = offset_or_null(layer.v_bias, kv_head * dim);
  if (spec_.kv_bits == 8) {
    const KvIntegers kv8 = slice.cache->integers(segment, index, kv_head);
    kernels_.store_integer_key(key, dim, position, kv8);
    kernels_.store_integer_value(projected + kv, bias, dim, stride, position, kv8);
    return;
  }
  if (spec_.kv_shape().paged()) {
    uint16_t* page = page_at(slice, position / kKvPage, index, kv_head);
    kernels_.store_key(key, dim, position % kKvPage, page);
    kernels_.store_value(projected + kv, bias, dim, stride, position % kKvPage, page + kKvPage * dim);
    return;
  }
  kernels_.store_key(key, dim, position, slice.cache->keys(segment, index, kv_head));
  kernels_.store_value(projected + kv, bias, dim, stride, position,
                       slice.cache->values(segment, index, kv_head));
}

void Walk::append_all(size_t layer) {
  size_t begin, end;
  member_.share(rows_, &begin, &end);
  for (const Slice& slice : w_.slices_) {
    const size_t first = std::max(begin, slice.row), last = std::min(end, slice.row + slice.count);
    for (size_t row = first; row < last; ++row)
      for (size_t head = 0; head < spec_.n_kv_heads; ++head) append(layer, slice, row - slice.row, head);
  }
}

void Walk::attend(size_t layer) {
  std::atomic<size_t>& next = w_.next_item_[layer];
  for (size_t i = next.fetch_add(1); i < w_.items_.size(); i = next.fetch_add(1))
    attend_item(layer, w_.items_[i]);
}

void Walk::attend_item(size_t index, const AttentionItem& item) {
  const DecoderLayer& layer = decoder_.layer(index);
  const Slice& slice = w_.slices_[item.slice];
  const size_t dim = spec_.head_dim, stride = spec_.kv_shape().value_stride(), q = spec_.q_size();
  const size_t group = spec_.n_heads / spec_.n_kv_heads, rows = item.queries * group;
  const size_t position = slice.position + item.first_query;
  const size_t begin = layer.window && position + 1 > layer.window ? position + 1 - layer.window : 0;
  const size_t first_seen = begin / kSegment;
  const size_t first = std::max(item.first_segment, first_seen);

  const bool paged = spec_.kv_shape().paged();

  // With one token per sequence, whoever looks at its segment stores it; nobody else reads that position.
  if (w_.fused_append_ && item.last_segment == position / kSegment) {
    append(index, slice, 0, item.kv_head);
    if (paged && (position + 1) % kKvPage == 0) seal(index, slice, position / kKvPage, item.kv_head);
  }

  float* memory = w_.attention_scratch_[member_.id].get();
  float* queries = memory;
  AttentionState total, part;
  total.mixed = queries + rows * stride;
  part.mixed = total.mixed + rows * stride;
  float* wide = part.mixed + rows * stride;
  total.peak = wide + kAttentionBlock * (dim + stride);
  total.sum = total.peak + rows;
  part.peak = total.sum + rows;
  part.sum = part.peak + rows;
  const bool integers = spec_.kv_bits == 8;
  const float unit = integers ? kLn2 : 1;
  const auto finish = [&](const AttentionState& state) {
    for (size_t row = 0; row < rows; ++row) {
      const size_t token = slice.row + item.first_query + row / group;
      const size_t head = item.kv_head * group + row % group;
      if (spec_.sinks)
        kernels_.add_sink(state, row, stride, unit, integers ? kWeightLevels : 1, layer.sinks[head]);
      kernels_.finish(state, row, dim, stride, w_.attended_ + token * q + head * dim);
    }
  };

  // Rounded queries lie where float ones would, one float row at a time behind them.
  const size_t groups = spec_.kv_shape().key_groups();
  int8_t* rounded = reinterpret_cast<int8_t*>(queries);
  float* scales = queries + rows * stride / sizeof(float);
  int32_t* starts = reinterpret_cast<int32_t*>(scales + rows * groups);
  if (first <= item.last_segment) {
    for (size_t row = 0; row < rows; ++row) {
      const size_t token = slice.row + item.first_query + row / group;
      const size_t head = item.kv_head * group + row % group;
      HeadPreparation p = preparation(index, token);
      if (!spec_.qk_norm_whole) {
        p.bias = offset_or_null(layer.q_bias, head * dim);
        p.norm = offset_or_null(layer.q_norm, 0);
      }
      p.scale = spec_.attention_scale;
      float* query = integers ? wide : queries + row * stride;
      kernels_.prepare_head(p, w_.qkv_ + token * w_.qkv_stride_ + head * dim, query);
      if (integers)
        kernels_.round_query(query, dim, rounded + row * stride, scales + row * groups,
                             starts + row * groups);
    }
  }
  const float softcap = spec_.attention_softcap;
  AttentionTile tile = {queries, rows, group, dim, stride, position, layer.window, softcap, 0};
  const IntegerTile integer_tile = {rounded, scales, starts,   rows,         group,           groups,
                                    dim,     stride, position, layer.window, softcap * kLog2e};
  const auto attend_segment = [&](size_t segment, bool fresh, const AttentionState& state) {
    if (integers) {
      kernels_.attend_integers(integer_tile, slice.cache->integers(segment, index, item.kv_head),
                               segment * kSegment, fresh, state);
      return;
    }
    if (paged) {
      const uint16_t* own = page_at(slice, position / kKvPage, index, item.kv_head);
      kernels_.attend_pages(tile, spec_.kv_bits, slice.cache->coded(segment, index, item.kv_head), own,
                            own + kKvPage * dim, segment * kSegment, fresh ? state : part, wide);
      if (!fresh) kernels_.merge(rows, stride, unit, state, part);
      return;
    }
    tile.segment_step = slice.cache->step_to_next(segment);
    kernels_.attend(tile, slice.cache->keys(segment, index, item.kv_head),
                    slice.cache->values(segment, index, item.kv_head), segment * kSegment,
                    fresh ? state : part, wide);
    if (!fresh) kernels_.merge(rows, stride, unit, state, part);
  };

  if (item.first_segment == 0 && item.last_segment + 1 == item.segments) {  // the whole tile
    for (size_t segment = first; segment <= item.last_segment; ++segment)
      attend_segment(segment, segment == first, total);
    finish(total);
    return;
  }
  const auto partial = [&](size_t segment) {
    AttentionState state;
    state.mixed = w_.partials_.get() + item.partial + segment * rows * (stride + 2);
    state.peak = state.mixed + rows * stride;
    state.sum = state.peak + rows;
    return state;
  };
  if (item.first_segment >= first_seen) attend_segment(item.first_segment, true, partial(item.first_segment));
  if (w_.open_parts_[item.tile].fetch_sub(1) > 1) return;
  w_.open_parts_[item.tile] = item.segments;  // for the next layer
  const AttentionState all = partial(first_seen);
  for (size_t segment = first_seen + 1; segment < item.segments; ++segment)
    kernels_.merge(rows, stride, unit, all, partial(segment));
  finish(all);
}

}  // namespace lowbit
