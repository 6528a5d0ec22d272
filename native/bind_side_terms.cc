// Python bindings of the terms beside codes and plain floats. Everything that a kernel relies on is checked
// here, once: packed/*_term.py check the same with better words.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <memory>
#include <string>

#include "bind_matrix.h"
#include "side_kernels.h"
#include "side_terms.h"
#include "team.h"

namespace nb = nanobind;
using namespace lowbit;

namespace {

[[noreturn]] void refuse(const std::string& why) { throw nb::value_error(("Matrix: " + why).c_str()); }

std::vector<uint32_t> numbers(const AnyArray& array) {
  std::vector<uint32_t> out(array.nbytes() / sizeof(uint32_t));
  if (!out.empty()) std::memcpy(out.data(), array.data(), out.size() * sizeof(uint32_t));
  return out;
}

void add_columns_term(BoundMatrix& self, AnyArray columns, AnyArray values, bool exclude) {
  Matrix& m = self.matrix;
  ColumnsTerm t;
  t.columns = numbers(columns);
  const size_t count = t.columns.size();
  if (!count || columns.nbytes() % sizeof(uint32_t)) refuse("outlier columns must be one or more uint32");
  for (size_t j = 0; j < count; ++j)
    if (t.columns[j] >= m.in_features || (j && t.columns[j] <= t.columns[j - 1]))
      refuse("outlier columns must be ascending and below in_features=" + std::to_string(m.in_features));
  t.values = static_cast<const uint16_t*>(checked("values", values, m.blocks() * count * kBlockRows * 2));
  if (exclude && !m.excluded.empty()) refuse("only one term may exclude columns from the codes");
  if (exclude) m.excluded = t.columns;
  m.columns.push_back(std::move(t));
  self.arrays.push_back(nb::cast(values));
}

void add_entries_term(BoundMatrix& self, AnyArray starts, AnyArray columns, AnyArray rows, AnyArray values) {
  Matrix& m = self.matrix;
  EntriesTerm t;
  checked("starts", starts, (m.blocks() + 1) * sizeof(uint32_t));
  t.starts = numbers(starts);
  const size_t count = rows.nbytes();
  t.columns = static_cast<const uint8_t*>(checked("columns", columns, count * sizeof(uint32_t)));
  t.rows = static_cast<const uint8_t*>(rows.data());
  t.values = static_cast<const uint8_t*>(checked("values", values, count * 2));
  if (t.starts[0] != 0 || t.starts[m.blocks()] != count) refuse("starts must rise from 0 to the entries");
  for (size_t b = 0; b < m.blocks(); ++b)
    if (t.starts[b] > t.starts[b + 1]) refuse("starts must rise from 0 to the entries");
  for (size_t i = 0; i < count; ++i) {
    uint32_t column;
    std::memcpy(&column, t.columns + 4 * i, 4);
    if (column >= m.in_features || t.rows[i] >= kBlockRows) refuse("an outlier entry lies outside its block");
  }
  m.entries.push_back(std::move(t));
  for (const AnyArray& array : {columns, rows, values}) self.arrays.push_back(nb::cast(array));
}

void add_low_rank_term(BoundMatrix& self, AnyArray u, AnyArray v) {
  Matrix& m = self.matrix;
  const size_t rank = v.nbytes() / (2 * m.in_features);
  if (!rank || rank > 65536) refuse("v of a low-rank term must have 1 to 65536 rows of in_features fp16");
  const void* second = checked("v", v, rank * m.in_features * 2);
  const void* first = checked("u", u, m.blocks() * rank * kBlockRows * 2);
  m.low_rank.push_back({rank, static_cast<const uint16_t*>(first), static_cast<const uint16_t*>(second)});
  for (const AnyArray& array : {u, v}) self.arrays.push_back(nb::cast(array));
}

void add_rows_term(BoundMatrix& self, AnyArray rows, nb::handle some) {
  Matrix& m = self.matrix;
  const Matrix& part = nb::cast<BoundMatrix&>(some).matrix;
  RowsTerm t = {numbers(rows), &part};
  if (t.rows.empty() || rows.nbytes() % sizeof(uint32_t)) refuse("rows must be one or more uint32");
  for (size_t k = 0; k < t.rows.size(); ++k)
    if (t.rows[k] >= m.out_features || (k && t.rows[k] <= t.rows[k - 1]))
      refuse("rows must be ascending and below out_features=" + std::to_string(m.out_features));
  if (part.out_features != t.rows.size() || part.in_features != m.in_features || part.codes.empty() ||
      part.has_side_terms() || !part.floats.empty())
    refuse("the matrix of some rows must have them, all inputs, and terms of codes only");
  m.rows.push_back(std::move(t));
  self.arrays.push_back(nb::borrow(some));
}

void add_gathered_term(BoundMatrix& self, AnyArray inputs, nb::handle ordered) {
  Matrix& m = self.matrix;
  const Matrix& part = nb::cast<BoundMatrix&>(ordered).matrix;
  GatheredTerm t = {numbers(inputs), &part};
  if (t.inputs.empty() || inputs.nbytes() % sizeof(uint32_t)) refuse("inputs must be one or more uint32");
  for (uint32_t input : t.inputs)
    if (input >= m.in_features && input != kNoInput)
      refuse("gathered inputs must be below in_features=" + std::to_string(m.in_features));
  if (part.out_features != m.out_features || part.in_features != t.inputs.size() || part.codes.empty() ||
      part.has_side_terms() || !part.floats.empty())
    refuse("the matrix of gathered inputs must have them, all rows, and terms of codes only");
  if (m.reads_integers() || !m.floats.empty() || !m.gathered.empty() || !m.excluded.empty())
    refuse("gathered inputs go without other codes and floats, and without excluded columns");
  m.gathered.push_back(std::move(t));
  self.arrays.push_back(nb::borrow(ordered));
}

// The byte where the codes of each block begin, from the mask.
std::vector<size_t> block_starts(const uint8_t* mask, size_t blocks, size_t chunks, size_t bits) {
  std::vector<size_t> starts = {0};
  for (size_t b = 0; b < blocks; ++b) {
    size_t kept = 0;
    for (size_t i = b * chunks * 16; i < (b + 1) * chunks * 16; ++i) {
      uint64_t word;
      std::memcpy(&word, mask + 8 * i, 8);
      kept += static_cast<size_t>(__builtin_popcountll(word));
    }
    starts.push_back(starts.back() + (kept * bits + 7) / 8);
  }
  return starts;
}

// Where no kernel reads masks the term becomes a dense one, in memory of its own.
void add_dense(BoundMatrix& self, const SparseTerm& s, int bits) {
  const Matrix& m = self.matrix;
  const size_t chunks = m.chunks(), bytes = m.blocks() * chunks * 128 * static_cast<size_t>(bits);
  uint8_t* const memory = new uint8_t[bytes + 64];
  self.arrays.push_back(nb::capsule(memory, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); }));
  uint8_t* const codes = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(memory), 64));
  CodeTerm t = s.term;
  t.bits = bits;
  t.codes = codes;
  {
    nb::gil_scoped_release release;
    team()->run([&](const Member& member) {
      size_t first, last;
      member.share(m.blocks(), &first, &last);
      densify(s, chunks, bits, first, last, codes);
    });
  }
  self.matrix.codes.push_back(t);
  ++self.matrix.densified;
}

void add_sparse_term(BoundMatrix& self, int bits, AnyArray mask, AnyArray codes,
                     const std::string& scale_type, AnyArray scales, size_t group_size, FloatArray levels,
                     size_t zero, int dense_bits, float tensor_scale) {
  Matrix& m = self.matrix;
  if (bits < 1 || bits > dense_bits || dense_bits > 8) refuse("bits must be 1 to 8, and no more than dense");
  if (group_size != 0 && (group_size % kSumStride != 0 || m.in_features % group_size != 0))
    refuse("group_size must be a multiple of 16 that divides in_features, or 0 for the whole row");
  SparseTerm s = {};
  CodeTerm& t = s.term;
  t.bits = bits;
  const bool row = group_size == 0 || group_size == m.in_features;
  t.group_size = row ? m.chunks() * kChunk : group_size;
  t.groups = row ? 1 : m.in_features / group_size;
  t.scale_type = number_named(scale_type);
  t.scales = checked("scales", scales, m.blocks() * t.groups * kBlockRows * number_bytes(t.scale_type));
  t.offset_type = Number::fp16;
  const size_t entries = levels.shape(1);
  if (levels.shape(0) != 1 || entries < 2 || entries > size_t{1} << dense_bits)
    refuse("levels of a sparse term must be [1, 2 to 2^bits]");
  if (zero >= entries || levels.data()[zero] != 0) refuse("the level of code `zero` must be 0");
  set_levels(t, levels.data(), 1, entries, tensor_scale);
  if (t.map ==
      Map::linear) {  // with a level of 0 all are multiples of the step: one kernel less for each width
    t.unit *= static_cast<float>(t.step);
    t.base /= t.step;
    t.step = 1;
  }
  s.zero = static_cast<uint8_t>(zero);
  s.mask = static_cast<const uint8_t*>(checked("mask", mask, m.blocks() * m.chunks() * 128));
  s.starts = block_starts(s.mask, m.blocks(), m.chunks(), static_cast<size_t>(bits));
  s.codes = static_cast<const uint8_t*>(checked("codes", codes, s.starts.back() + 64));
  self.arrays.push_back(nb::cast(scales));
  if (!side_kernels().sparse) return add_dense(self, s, dense_bits);
  m.sparse.push_back(std::move(s));
  for (const AnyArray& array : {mask, codes}) self.arrays.push_back(nb::cast(array));
}

}  // namespace

void bind_side_terms(nb::module_& m, nb::class_<BoundMatrix>& matrix) {
  matrix.def("add_columns_term", &add_columns_term, nb::arg("columns"), nb::arg("values"), nb::arg("exclude"))
      .def("add_entries_term", &add_entries_term, nb::arg("starts"), nb::arg("columns"), nb::arg("rows"),
           nb::arg("values"))
      .def("add_low_rank_term", &add_low_rank_term, nb::arg("u"), nb::arg("v"))
      .def("add_rows_term", &add_rows_term, nb::arg("rows"), nb::arg("matrix"))
      .def("add_gathered_term", &add_gathered_term, nb::arg("inputs"), nb::arg("matrix"))
      .def("add_sparse_term", &add_sparse_term, nb::arg("bits"), nb::arg("mask"), nb::arg("codes"),
           nb::arg("scale_type"), nb::arg("scales"), nb::arg("group_size"), nb::arg("levels"),
           nb::arg("zero"), nb::arg("dense_bits"), nb::arg("tensor_scale") = 1.0f);
  m.def(
      "multiplies_masks", [] { return side_kernels().sparse; },
      "Does this instruction set multiply sparse terms as they are stored? If not, they become dense at "
      "load.");
}
