// Python binding of packing and round-to-nearest. Shapes are checked here, once.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "layout.h"
#include "matrix.h"
#include "rtn.h"

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

static void check_base3(const char* what, size_t rows, size_t columns, const size_t shape[4]) {
  if (shape[0] != round_up(rows, kBlockRows) / kBlockRows ||
      shape[1] != (columns + kBase3Inputs - 1) / kBase3Inputs || shape[2] != 2 || shape[3] != 64)
    throw std::invalid_argument(std::string(what) + ": packed must be [blocks, vectors, 2, 64]");
}

static void bound_pack_base3(ByteMatrixIn codes, Packed packed) {
  const size_t shape[4] = {packed.shape(0), packed.shape(1), packed.shape(2), packed.shape(3)};
  check_base3("pack_base3", codes.shape(0), codes.shape(1), shape);
  nb::gil_scoped_release release;
  pack_base3(codes.data(), codes.shape(0), codes.shape(1), packed.data());
}

static void bound_unpack_base3(PackedIn packed, ByteMatrix codes) {
  const size_t shape[4] = {packed.shape(0), packed.shape(1), packed.shape(2), packed.shape(3)};
  check_base3("unpack_base3", codes.shape(0), codes.shape(1), shape);
  nb::gil_scoped_release release;
  unpack_base3(packed.data(), codes.shape(0), codes.shape(1), codes.data());
}

using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatRow = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes3 = nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using AnyArray = nb::ndarray<nb::c_contig, nb::device::cpu>;

static float bound_largest_magnitude(Floats weights) {
  nb::gil_scoped_release release;
  const uint32_t bits = largest_magnitude_bits(weights.data(), weights.size());
  float largest;
  std::memcpy(&largest, &bits, 4);
  return largest;
}

static void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("round_to_nearest: ") + what);
}

static Number scale_number(const std::string& name) {
  if (name == "fp16") return Number::fp16;
  if (name == "fp32") return Number::fp32;
  if (name == "e8m0") return Number::e8m0;
  require(name == "e4m3", "scale_type must be fp16, fp32, e8m0 or e4m3");
  return Number::e4m3;
}

// Columns of `parameters`, one row for each table.
enum Parameter {
  kStep,
  kFirst,
  kTopInverse,
  kBottomInverse,
  kLowerNormal,
  kLowerCover,
  kTopExponent,
  kRoots,
  kParameters
};

static std::pair<double, double> bound_round_to_nearest(
    Floats weights, std::optional<FloatRow> counts, Packed codes, AnyArray scales,
    std::optional<Bytes3> zero_points, std::optional<Bytes3> selectors, std::optional<Bytes3> multipliers,
    std::vector<float> digits, int bits, size_t group_size, size_t together, const std::string& scale_type,
    float divisor, Floats levels, Floats boundaries, ByteMatrixIn level_codes, Floats parameters, bool linear,
    bool both_signs, bool mean_start, bool mse, bool weigh, bool base3) {
  RtnJob job = {};
  job.weights = weights.data();
  job.rows = weights.shape(0);
  job.columns = weights.shape(1);
  require(job.rows > 0 && job.columns > 0, "weights must not be empty");
  require(!counts || counts->size() == job.columns, "counts must be [columns]");
  job.counts = counts ? counts->data() : nullptr;
  job.planes = std::max<size_t>(digits.size(), 1);
  job.digits = digits.data();
  require(codes.shape(0) % job.planes == 0, "codes must be those of each plane, one after the other");
  const size_t blocks = codes.shape(0) / job.planes;
  const size_t shape[4] = {blocks, codes.shape(1), codes.shape(2), codes.shape(3)};
  job.base3 = base3;
  if (base3) {
    require(bits == 2 && levels.shape(0) == 1 && levels.shape(1) == 3, "base-3 codes have three levels");
    check_base3("round_to_nearest", job.rows, job.columns, shape);
  } else {
    check_packed("round_to_nearest", job.rows, job.columns, bits, shape);
  }
  job.plane_codes = codes.size() / job.planes;
  if (job.planes > 1) {
    size_t combinations = 1;
    for (size_t p = 0; p < job.planes && combinations <= kMaxCombinations; ++p)
      combinations *= levels.shape(1);
    require(levels.shape(0) == 1 && levels.shape(1) == static_cast<size_t>(bits) + 1 && bits <= 2 &&
                combinations <= kMaxCombinations,
            "several planes have levels -1, 1 or -1, 0, 1 and up to 256 combinations");
    require(!zero_points && !selectors && !multipliers, "several planes have scales only");
  }
  require(group_size == 0 || (group_size % 4 == 0 && job.columns % group_size == 0),
          "group_size must divide the columns and be a multiple of 4, or be 0");
  job.group_size = group_size ? group_size : job.columns;
  job.groups = job.columns / job.group_size;
  require(together >= 1 && job.groups % together == 0, "together must divide the groups");
  job.together = together;
  require(divisor > 0, "divisor must be positive");
  job.divisor = divisor;
  job.bits = bits;
  job.scale_type = scale_number(scale_type);
  job.mse = mse;
  job.weigh = weigh;
  job.affine = zero_points.has_value();
  job.mean_start = mean_start;

  const size_t per_matrix = blocks * job.groups * kBlockRows;
  require(scales.nbytes() == per_matrix / together * job.planes * number_bytes(job.scale_type),
          "scales must be [blocks, groups / together, 32]");
  require(multipliers.has_value() || together == 1, "groups share a scale only with multipliers");
  if (multipliers) {
    require(multipliers->size() == blocks * job.groups * kTileRows,
            "multipliers must be [blocks, groups, 16]");
    require(job.scale_type == Number::fp16 && !zero_points && !selectors && group_size % 4 == 0 && group_size,
            "multipliers need fp16 scales, groups, and neither zero_points nor selectors");
    job.multipliers = multipliers->data();
  }
  job.scales = scales.data();
  job.codes = codes.data();
  for (const auto& bytes : {zero_points, selectors})
    require(!bytes || bytes->size() == per_matrix, "zero_points and selectors must be [blocks, groups, 32]");
  if (zero_points) job.zero_points = zero_points->data();
  if (selectors) job.selectors = selectors->data();

  const size_t tables = levels.shape(0), count = levels.shape(1);
  require(tables >= 1 && tables <= 4 && count >= 2 && count <= (size_t{1} << bits),
          "levels have a wrong shape");
  require(tables == 1 || (selectors && !zero_points), "several tables need selectors and no zero_points");
  require(boundaries.shape(0) == tables && boundaries.shape(1) == count - 1 &&
              level_codes.shape(0) == tables && level_codes.shape(1) == count &&
              parameters.shape(0) == tables && parameters.shape(1) == kParameters,
          "boundaries, level_codes or parameters have a wrong shape");
  for (size_t i = 0; i < tables * count; ++i)
    require(level_codes.data()[i] < (base3 ? 3 : 1 << bits), "a level code does not fit the bits");
  for (size_t table = 0; table < tables; ++table) {
    const float* p = parameters.data() + table * kParameters;
    LevelTable t = {};
    t.count = count;
    t.linear = linear;
    t.step = p[kStep];
    t.first = p[kFirst];
    t.levels = levels.data() + table * count;
    t.boundaries = boundaries.data() + table * (count - 1);
    t.codes = level_codes.data() + table * count;
    t.top_inverse = p[kTopInverse];
    t.bottom_inverse = p[kBottomInverse];
    t.lower_normal = p[kLowerNormal];
    t.lower_cover = p[kLowerCover];
    t.top_exponent = static_cast<int>(p[kTopExponent]);
    t.roots = static_cast<int>(p[kRoots]);
    require(t.roots >= 0 && t.roots <= 10, "roots must be 0 to 10");
    t.both_signs = both_signs;
    job.tables.push_back(t);
  }
  std::vector<double> sums(2 * blocks, 0.0);
  job.errors = sums.data();
  job.squares = sums.data() + blocks;
  nb::gil_scoped_release release;
  const RtnSums result = round_to_nearest(job);
  return {result.error, result.square};
}

void bind_quantize(nb::module_& m) {
  m.def("largest_magnitude", &bound_largest_magnitude, nb::arg("weights"),
        "Largest magnitude of float32 [rows, columns]; infinite or NaN if one of them is.");
  m.def("round_to_nearest", &bound_round_to_nearest, nb::arg("weights"), nb::arg("counts").none(),
        nb::arg("codes"), nb::arg("scales"), nb::arg("zero_points").none(), nb::arg("selectors").none(),
        nb::arg("multipliers").none(), nb::arg("digits"), nb::arg("bits"), nb::arg("group_size"),
        nb::arg("together"), nb::arg("scale_type"), nb::arg("divisor"), nb::arg("levels"),
        nb::arg("boundaries"), nb::arg("level_codes"), nb::arg("parameters"), nb::arg("linear"),
        nb::arg("both_signs"), nb::arg("mean_start"), nb::arg("mse"), nb::arg("weigh"), nb::arg("base3"),
        "Quantize float32 [rows, columns] into zeroed codes and scales; see quantize/native.py. Returns the "
        "sums "
        "of squared errors and of squared weights, both over divisor^2.");
  m.def("pack_codes", &bound_pack_codes, nb::arg("codes"), nb::arg("packed"), nb::arg("bits"),
        "Pack codes uint8 [out, in] into packed uint8 [blocks, chunks, 2, 64 * bits].");
  m.def("unpack_codes", &bound_unpack_codes, nb::arg("packed"), nb::arg("codes"), nb::arg("bits"),
        "Unpack packed uint8 [blocks, chunks, 2, 64 * bits] into codes uint8 [out, in].");
  m.def("pack_base3", &bound_pack_base3, nb::arg("codes"), nb::arg("packed"),
        "Pack codes 0, 1, 2, uint8 [out, in], into packed uint8 [blocks, vectors, 2, 64].");
  m.def("unpack_base3", &bound_unpack_base3, nb::arg("packed"), nb::arg("codes"),
        "Unpack packed uint8 [blocks, vectors, 2, 64] into codes uint8 [out, in].");
}
