// Pages of 4- and 2-bit keys and values in a pass: where their 16-bit numbers lie, and when they become
// codes.
//
// A pass writes keys and values in 16 bit, layer by layer. Pages that the sequence may end in or goes on with
// lie in its cache; the others are only needed until the layer is done and share the memory of all layers.
// Before attention looks, every page that the pass completes becomes codes. A query of that very page still
// reads it in 16 bit: what it sees is the same however the tokens are fed.
#include "decoder_step.h"

namespace lowbit {

// Once the slices are known and their caches hold their pages.
void DecoderWorkspace::plan_pages() {
  complete_pages_.clear();
  const KvShape shape = spec_.kv_shape();
  if (!shape.paged()) return;
  size_t passing = 0;
  for (size_t i = 0; i < slices_.size(); ++i) {
    Slice& s = slices_[i];
    const size_t first = s.position / kKvPage, end = (s.position + s.count) / kKvPage;
    s.passing = passing;
    for (size_t page = first; page < end; ++page) complete_pages_.push_back({i, page});
    passing += end - first;
  }
  if (fused_append_) return;  // all pages are held, and attention completes them
  const size_t numbers = passing * shape.n_kv_heads * shape.slot_numbers();
  passing_pages_.grow(numbers * sizeof(uint16_t) / sizeof(float));
}

// 16-bit keys [64 / 16][head_dim][16] and values [64][stride].
uint16_t* Walk::page_at(const Slice& slice, size_t page, size_t layer, size_t kv_head) const {
  if (uint16_t* held = slice.cache->held_page(page, layer, kv_head)) return held;
  const size_t index = slice.passing + page - slice.position / kKvPage;
  return reinterpret_cast<uint16_t*>(w_.passing_pages_.get()) +
         (index * spec_.n_kv_heads + kv_head) * spec_.kv_shape().slot_numbers();
}

void Walk::seal(size_t layer, const Slice& slice, size_t page, size_t kv_head) {
  const KvShape shape = spec_.kv_shape();
  const size_t first = page * kKvPage;
  uint8_t* head = slice.cache->coded(first / kSegment, layer, kv_head);
  const uint16_t* keys = page_at(slice, page, layer, kv_head);
  kernels_.seal_page(shape.bits, keys, keys + kKvPage * shape.head_dim, shape.head_dim, shape.value_stride(),
                     first, head);
}

void Walk::seal_all(size_t layer) {
  size_t begin, end;
  member_.share(w_.complete_pages_.size() * spec_.n_kv_heads, &begin, &end);
  for (size_t i = begin; i < end; ++i) {
    const CompletePage& complete = w_.complete_pages_[i / spec_.n_kv_heads];
    seal(layer, w_.slices_[complete.slice], complete.page, i % spec_.n_kv_heads);
  }
}

}  // namespace lowbit
