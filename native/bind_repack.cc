// Python binding of the GGUF repacking. Sizes are checked here, once.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "layout.h"
#include "matrix.h"
#include "repack.h"

namespace nb = nanobind;
using namespace lowbit;

namespace {

using Input = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::c_contig, nb::device::cpu>;
using Order = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr size_t kMostFeatures = size_t{1} << 28;  // as in packed/matrix.py: no product below overflows

void need(const char* what, size_t bytes, size_t wanted) {
  if (bytes != wanted)
    throw std::invalid_argument(std::string(what) + " has " + std::to_string(bytes) +
                                " bytes, this tensor needs " + std::to_string(wanted));
}

void check_shape(size_t rows, size_t columns) {
  if (!rows || !columns || rows > kMostFeatures || columns > kMostFeatures)
    throw std::invalid_argument("repack: rows and columns must be 1 to 2^28");
}

const int64_t* checked_order(const std::optional<Order>& order, size_t rows) {
  if (!order) return nullptr;
  if (order->shape(0) != rows) throw std::invalid_argument("repack: order needs one entry for each row");
  for (size_t r = 0; r < rows; ++r)
    if (order->data()[r] < 0 || static_cast<size_t>(order->data()[r]) >= rows)
      throw std::invalid_argument("repack: order names a row that does not exist");
  return order->data();
}

// The data of an array that is given exactly where `needed`, with so many bytes.
void* optional_data(const char* what, const std::optional<Output>& array, bool needed, size_t bytes) {
  if (array.has_value() != needed)
    throw std::invalid_argument(std::string(what) + ": given exactly for the types that have them");
  if (!array) return nullptr;
  need(what, array->nbytes(), bytes);
  return array->data();
}

void bound_repack(int number, const Input& raw, size_t rows, size_t columns, const Output& codes,
                  const Output& scales, const std::optional<Output>& offsets,
                  const std::optional<Output>& factors, const std::optional<Output>& offset_factors,
                  const std::optional<Order>& order, const std::optional<Input>& grid, bool base3) {
  const BlockType* type = find_block_type(number);
  if (!type) throw std::invalid_argument("repack: unknown tensor type " + std::to_string(number));
  check_shape(rows, columns);
  if (columns % type->weights)
    throw std::invalid_argument("repack: columns must be a multiple of " + std::to_string(type->weights));
  if (base3 && (type->bits != 2 || type->group != type->weights))
    throw std::invalid_argument("repack: base 3 is for ternary types");
  const size_t padded = round_up(rows, kBlockRows);
  const size_t groups = padded * (columns / type->group);
  const size_t numbers = padded * (columns / type->weights) * type->scales();
  const size_t vectors = round_up(columns, kBase3Inputs) / kBase3Inputs;
  need("repack: raw", raw.nbytes(), rows * (columns / type->weights) * type->bytes);
  need("repack: codes", codes.nbytes(),
       base3 ? padded * vectors * 4 : padded * columns * static_cast<size_t>(type->bits) / 8);
  need("repack: scales", scales.nbytes(), numbers * type->scale_bytes);
  Repacked out = {};
  out.codes = static_cast<uint8_t*>(codes.data());
  out.base3 = base3;
  out.scales = scales.data();
  out.offsets = static_cast<uint16_t*>(
      optional_data("repack: offsets", offsets, type->offsets, numbers * sizeof(uint16_t)));
  out.factors = static_cast<int8_t*>(optional_data("repack: factors", factors, type->factors, groups));
  out.offset_factors = static_cast<int8_t*>(
      optional_data("repack: offset_factors", offset_factors, type->factors && type->offsets, groups));
  if (grid.has_value() != (type->members != 0))
    throw std::invalid_argument("repack: the grid is given exactly for the types that have one");
  if (grid) need("repack: grid", grid->nbytes(), type->members * type->width);
  const int64_t* rows_of = checked_order(order, rows);
  const uint8_t* grid_data = grid ? static_cast<const uint8_t*>(grid->data()) : nullptr;
  nb::gil_scoped_release release;
  repack(*type, static_cast<const uint8_t*>(raw.data()), rows, columns, rows_of, grid_data, out);
}

void bound_transpose(const Input& values, const Output& packed, const std::optional<Order>& order) {
  if (values.ndim() != 2 || packed.ndim() != 3)
    throw std::invalid_argument("transpose_values: wrong dimensions");
  const size_t rows = values.shape(0), columns = values.shape(1), item_bytes = values.itemsize();
  check_shape(rows, columns);
  if ((item_bytes != 2 && item_bytes != 4) || packed.itemsize() != item_bytes)
    throw std::invalid_argument("transpose_values: items must have 2 or 4 bytes on both sides");
  need("transpose_values: packed", packed.nbytes(), round_up(rows, kBlockRows) * columns * item_bytes);
  const int64_t* rows_of = checked_order(order, rows);
  nb::gil_scoped_release release;
  transpose_values(values.data(), item_bytes, rows, columns, rows_of, packed.data());
}

}  // namespace

void bind_repack(nb::module_& m) {
  m.def("repack", &bound_repack, nb::arg("type"), nb::arg("raw"), nb::arg("rows"), nb::arg("columns"),
        nb::arg("codes"), nb::arg("scales"), nb::arg("offsets") = nb::none(), nb::arg("factors") = nb::none(),
        nb::arg("offset_factors") = nb::none(), nb::arg("order") = nb::none(), nb::arg("grid") = nb::none(),
        nb::arg("base3") = false,
        "Repack the blocks of a GGUF tensor into kernel order, on all threads; the arrays are filled in "
        "place.");
  m.def("transpose_values", &bound_transpose, nb::arg("values"), nb::arg("packed"),
        nb::arg("order") = nb::none(),
        "Plain floats [rows, columns] of 2 or 4 bytes to [blocks, columns, 32], on all threads.");
}
