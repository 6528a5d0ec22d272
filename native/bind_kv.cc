// Python's view of caches of keys and values, and of the pools that they share.
#include <memory>
#include <vector>

#include "bind_decoder.h"
#include "kv_cache.h"

using namespace lowbit;

namespace {

struct BoundPool {
  std::shared_ptr<KvPool> pool;
};

nb::list blocks_of(KvCache& self) {
  nb::list list;
  for (KvBlock& block : self.hold()) list.append(nb::cast(std::move(block)));
  return list;
}

bool adopt(KvCache& self, nb::handle blocks, size_t length) {
  std::vector<nb::object> owners;
  std::vector<const KvBlock*> held;
  for (nb::handle h : nb::iter(blocks)) {
    const KvBlock* block = nullptr;
    if (h.is_none() || !nb::try_cast(h, block, false) || !block)
      throw nb::type_error("KvCache.adopt: expected a list of KvBlock");
    owners.push_back(nb::borrow(h));
    held.push_back(block);
  }
  return self.adopt(held, length);
}

}  // namespace

void bind_kv(nb::module_& m) {
  nb::class_<BoundPool>(m, "KvPool", "Blocks of keys and values that many caches take from and share.")
      .def(
          "__init__",
          [](BoundPool* self, const BoundDecoder& decoder, size_t blocks) {
            new (self) BoundPool{std::make_shared<KvPool>(decoder.decoder.spec().kv_shape(), blocks)};
          },
          nb::arg("decoder"), nb::arg("blocks"), "Reserves address space; memory is taken as it is written.")
      .def_prop_ro("blocks", [](const BoundPool& self) { return self.pool->blocks(); })
      .def_prop_ro("free_blocks", [](const BoundPool& self) { return self.pool->free_blocks(); })
      .def_prop_ro("block_bytes", [](const BoundPool& self) { return self.pool->block_bytes(); })
      .def_prop_ro(
          "slot_bytes", [](const BoundPool& self) { return self.pool->slot_bytes(); },
          "What a sequence takes beside its blocks: one page in 16 bit with 4 and 2 bits, else 0.")
      .def_prop_ro("block_positions", [](const BoundPool&) { return kSegment; })
      .def_prop_ro(
          "page_positions", [](const BoundPool& self) { return self.pool->shape().page_positions(); },
          "A shared beginning can be any multiple of this many positions long.")
      .def(
          "trim", [](BoundPool& self) { self.pool->trim(); },
          "Gives the memory of free blocks back to the system.");

  nb::class_<KvBlock>(m, "KvBlock",
                      "Holds one block of a pool; its content stays until the last holder goes.")
      .def_prop_ro("positions", &KvBlock::positions, "How many of its positions are written.");

  nb::class_<KvCache>(m, "KvCache", "Keys and values of one sequence; memory is taken as it grows.")
      .def(
          "__init__",
          [](KvCache* self, const BoundDecoder& decoder, size_t capacity) {
            new (self) KvCache(decoder.decoder.spec().kv_shape(), capacity);
          },
          nb::arg("decoder"), nb::arg("capacity"), "A cache with memory of its own.")
      .def(
          "__init__",
          [](KvCache* self, const BoundPool& pool, size_t capacity) {
            new (self) KvCache(pool.pool, capacity);
          },
          nb::arg("pool"), nb::arg("capacity"), "A cache that takes its blocks from a pool: see reserve().")
      .def_prop_ro("length", &KvCache::length)
      .def_prop_ro("capacity", &KvCache::capacity)
      .def_prop_ro("nbytes", &KvCache::bytes, "Bytes of all `capacity` positions once they are written.")
      .def(
          "reserve", &KvCache::reserve, nb::arg("length"),
          "Blocks for positions below `length`, ready to be written; False, and nothing changed, if the pool "
          "has too few. A step needs them for every position that it appends.")
      .def("blocks", &blocks_of, "Holds on the blocks below the present length, as a list of KvBlock.")
      .def("adopt", &adopt, nb::arg("blocks"), nb::arg("length"),
           "An empty cache begins with the first `length` positions of `blocks`: whole blocks are shared, a "
           "partial last one is copied. False, and nothing changed, if the pool lacks the block for that.")
      .def(
          "truncate", &KvCache::truncate, nb::arg("length"),
          "Forgets the positions from `length` on and gives the blocks beyond back; returns the length kept.")
      .def("clear", &KvCache::clear, "Forgets all and gives every block back.");
}
