// Python binding of packing and round-to-nearest. Shapes are checked here, once.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "layout.h"
#include "matrix.h"

namespace nb = nanobind;
using namespace lowbit;

using ByteMatrix = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ByteMatrixIn = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Packed = nb::ndarray<uint8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using PackedIn = nb::ndarray<const uint8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

static void check_packed(const char* what, size_t rows, size_t columns, int bits, const size_t shape[4]) {
  if (bits < 1 || bits > 8) throw std::invalid_argument(std::string(what) + ": bits must be 1 to 8");
  if (shape[0] != round_up(rows, kBlockRows) / kBlockRows || shape[1] != round_up(columns, kChunk) / kChunk ||
      shape[2] != 2 || shape[3] != 64 * static_cast<size_t>(bits))
    throw std::invalid_argument(std::string(what) + ": packed must be [blocks, chunks, 2, 64 * bits]");
}

static void bound_pack_codes(ByteMatrixIn codes, Packed packed, int bits) {
  const size_t shape[4] = {packed.shape(0), packed.shape(1), packed.shape(2), packed.shape(3)};
  check_packed("pack_codes", codes.shape(0), codes.shape(1), bits, shape);
  nb::gil_scoped_release release;
  pack_codes(codes.data(), codes.shape(0), codes.shape(1), bits, packed.data());
}

static void bound_unpack_codes(PackedIn packed, ByteMatrix codes, int bits) {
  const size_t shape[4] = {packed.shape(0), packed.shape(1), packed.shape(2), packed.shape(3)};
  check_packed("unpack_codes", codes.shape(0), codes.shape(1), bits, shape);
  nb::gil_scoped_release release;
  unpack_codes(packed.data(), codes.shape(0), codes.shape(1), bits, codes.data());
}

void bind_quantize(nb::module_& m) {
  m.def("pack_codes", &bound_pack_codes, nb::arg("codes"), nb::arg("packed"), nb::arg("bits"),
        "Pack codes uint8 [out, in] into packed uint8 [blocks, chunks, 2, 64 * bits].");
  m.def("unpack_codes", &bound_unpack_codes, nb::arg("packed"), nb::arg("codes"), nb::arg("bits"),
        "Unpack packed uint8 [blocks, chunks, 2, 64 * bits] into codes uint8 [out, in].");
}
