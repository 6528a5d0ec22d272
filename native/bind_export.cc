// Python binding of what writing other tools' files needs. Sizes are checked here, once.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "gguf_fit.h"
#include "matrix.h"

namespace nb = nanobind;
using namespace lowbit;

namespace {

using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using BytesOut = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Packed = nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void bound_fit_blocks(int number, Floats weights, BytesOut blocks) {
  const FitType* type = find_fit_type(number);
  if (!type) throw std::invalid_argument("fit_blocks: no fit for tensor type " + std::to_string(number));
  const size_t rows = weights.shape(0), columns = weights.shape(1);
  if (columns % type->weights)
    throw std::invalid_argument("fit_blocks: columns must be a multiple of " + std::to_string(type->weights));
  const size_t each = columns / type->weights;
  if (blocks.shape(0) != rows || blocks.shape(1) != each * type->bytes)
    throw std::invalid_argument("fit_blocks: blocks must be [rows, bytes of a row]");
  nb::gil_scoped_release release;
  fit_blocks(*type, weights.data(), rows * each, blocks.data());
}

void bound_float_rows(const std::string& type, Packed packed, size_t first, FloatsOut rows) {
  const bool wide = type == "fp32", bf16 = type == "bf16";
  if (!wide && !bf16 && type != "fp16")
    throw std::invalid_argument("float_rows: type must be fp32, fp16 or bf16");
  const size_t bytes = wide ? 4 : 2, count = rows.shape(0), columns = rows.shape(1);
  if (packed.itemsize() != bytes || packed.shape(1) != columns || packed.shape(2) != kBlockRows)
    throw std::invalid_argument("float_rows: packed must be [blocks, columns, 32] of that type");
  if (first % kBlockRows || count > packed.shape(0) * kBlockRows ||
      first > packed.shape(0) * kBlockRows - count)
    throw std::invalid_argument("float_rows: first must be a multiple of 32, and the rows must exist");
  nb::gil_scoped_release release;
  float_rows(packed.data(), bytes, bf16, first, count, columns, rows.data());
}

}  // namespace

void bind_export(nb::module_& m) {
  m.def("fit_blocks", &bound_fit_blocks, nb::arg("number"), nb::arg("weights"), nb::arg("blocks"),
        "Fit blocks of GGUF type 3 (Q4_1), 12 (Q4_K) or 14 (Q6_K) to finite float32 [rows, columns]; see "
        "interop/gguf_fit.py.");
  m.def("float_rows", &bound_float_rows, nb::arg("type"), nb::arg("packed"), nb::arg("first"),
        nb::arg("rows"), "Rows of packed values [blocks, columns, 32] into float32 [rows, columns].");
}
