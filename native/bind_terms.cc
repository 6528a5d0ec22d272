// Python bindings of the terms of a Matrix. Everything that a kernel relies on is checked here, once.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>

#include "bind_matrix.h"
#include "crossover.h"
#include "matmul_kernels.h"

namespace nb = nanobind;
using namespace lowbit;

namespace lowbit {

Number number_named(const std::string& name) {
  if (name == "fp32") return Number::fp32;
  if (name == "fp16") return Number::fp16;
  if (name == "bf16") return Number::bf16;
  if (name == "e8m0") return Number::e8m0;
  if (name == "e4m3") return Number::e4m3;
  throw nb::value_error(("number type '" + name + "' is not one of fp32, fp16, bf16, e8m0, e4m3").c_str());
}

const void* checked(const char* what, const AnyArray& array, size_t bytes) {
  if (array.nbytes() == bytes) return array.data();
  throw nb::value_error((std::string("Matrix: ") + what + " has " + std::to_string(array.nbytes()) +
                         " bytes, its shape needs " + std::to_string(bytes))
                            .c_str());
}

// Largest level that stays linear: 64 products with 16-bit activations (16256 at most) then fit int32.
constexpr float kLinearMax = 2000;

// Chooses how levels become integers: an arithmetic progression stays linear; levels that are integers of
// at most 127 times a power of two fit one byte; all others take two limbs, within peak / 32512 of exact.
void set_levels(CodeTerm& t, const float* levels, size_t tables, size_t count, float tensor_scale) {
  float peak = 0;
  for (size_t i = 0; i < tables * count; ++i) {
    if (!std::isfinite(levels[i])) throw nb::value_error("Matrix: levels must be finite");
    peak = std::max(peak, std::fabs(levels[i]));
  }
  if (peak == 0) throw nb::value_error("Matrix: levels must not all be zero");
  const auto integral = [&](float unit, float limit) {
    for (size_t i = 0; i < tables * count; ++i) {
      const float q = levels[i] / unit;
      if (q != std::nearbyint(q) || std::fabs(q) > limit) return false;
    }
    return true;
  };
  float unit = 0;
  if (tables == 1 && integral(1.0f, kLinearMax)) {
    const int base = static_cast<int>(levels[0]);
    const int step = count > 1 ? static_cast<int>(levels[1]) - base : 1;
    bool linear = step != 0 && std::abs(step) < 256 && std::abs(base) <= 256;
    for (size_t i = 0; i < count; ++i)
      linear = linear && levels[i] == static_cast<float>(base + step * static_cast<int>(i));
    if (linear) {
      t.map = Map::linear;
      t.step = step;
      t.base = base;
      t.count = static_cast<int32_t>(count);
      t.unit = tensor_scale;
      return;
    }
  }
  for (int power = 8; power >= -24 && unit == 0; --power)
    if (integral(std::ldexp(1.0f, power), 127.0f)) unit = std::ldexp(1.0f, power);
  t.map = unit != 0 ? Map::table1 : Map::table2;
  if (unit == 0) {  // a power of two that makes them exact, if there is one; else the finest grid
    for (int power = 8; power >= -24 && unit == 0; --power)
      if (integral(std::ldexp(1.0f, power), static_cast<float>(kLimbMax))) unit = std::ldexp(1.0f, power);
    if (unit == 0) unit = peak / static_cast<float>(kLimbMax);
  }
  t.unit = unit * tensor_scale;
  std::memset(t.high, 128, sizeof t.high);
  std::memset(t.low, 128, sizeof t.low);
  const size_t stride = tables > 1 ? 16 : 256;
  for (size_t table = 0; table < tables; ++table) {
    for (size_t i = 0; i < count; ++i) {
      const int q = static_cast<int>(std::nearbyint(levels[table * count + i] / unit));
      const int high = t.map == Map::table2 ? static_cast<int>(std::floor((q + 64) / 128.0)) : q;
      t.high[table * stride + i] = static_cast<uint8_t>(high + 128);
      if (t.map == Map::table2) t.low[table * stride + i] = static_cast<uint8_t>(q - kLimbBase * high + 128);
    }
  }
  // A 16-entry lookup wants the whole table in 16 bytes, a 64-entry one in 64: unused entries are zero.
}

}  // namespace lowbit

namespace {

// How codes lie in memory: planes, or base 3 with five ternary codes in a byte.
void set_packing(CodeTerm& t, const std::string& packing, size_t in_features) {
  if (packing == "planes") return;
  if (packing != "base3")
    throw nb::value_error(("Matrix: packing '" + packing + "' is not one of planes, base3").c_str());
  if (t.bits != 2)
    throw nb::value_error(
        ("Matrix: packing base3 holds 2-bit codes below 3, received bits=" + std::to_string(t.bits)).c_str());
  if (t.groups > 1 && t.group_size % kActivationGroup != 0)
    throw nb::value_error(("Matrix: packing base3 needs group_size 0 or a multiple of 64, received " +
                           std::to_string(t.group_size) + "; store planes")
                              .c_str());
  t.base3 = true;
  t.vectors = round_up(in_features, 4 * kTritSteps) / (4 * kTritSteps);
}

// Checks the groups that share a multiplier. Products of level and multiplier have to fit a signed byte.
void set_multipliers(CodeTerm& t, size_t size, size_t entries, size_t in_features) {
  if (t.zero_points || t.offsets || t.selectors || t.base3)
    throw nb::value_error(
        "Matrix: multipliers go with planes of codes without zero points, offsets and tables");
  if (size == 0 || size % kSumStride != 0 || in_features % size != 0 ||
      (t.groups > 1 && (t.group_size % size != 0 || t.group_size % kActivationGroup != 0)))
    throw nb::value_error(
        ("Matrix: multiplier_size=" + std::to_string(size) +
         " must be a multiple of 16 that divides in_features=" + std::to_string(in_features) +
         " and group_size=" + std::to_string(t.groups > 1 ? t.group_size : 0) +
         ", which must be 0 or a multiple of 64")
            .c_str());
  int largest = 0;
  for (size_t i = 0; i < entries; ++i) {
    const int level = t.map == Map::linear ? t.step * static_cast<int>(i) + t.base : t.high[i] - 128;
    largest = std::max(largest, std::abs(level));
  }
  if (t.map == Map::table2 || largest * 15 > 127)
    throw nb::value_error("Matrix: multipliers of up to 15 need integer levels from -8 to 8; use fewer bits");
  t.multiplier_size = size;
  t.multiplier_groups = in_features / size;
}

// How many groups share an fp16 scale, and an fp16 offset, to which their factors belong.
size_t span_of(const CodeTerm& t, size_t super_size, bool offsets, bool offset_factors) {
  if (t.scale_type != Number::fp16 || (offsets && t.offset_type != Number::fp16) || offsets != offset_factors)
    throw nb::value_error("Matrix: factors go with fp16 scales, and offset factors with fp16 offsets");
  if (super_size == 0) return t.groups;
  if (super_size % t.group_size != 0 || t.groups % (super_size / t.group_size) != 0)
    throw nb::value_error(("Matrix: super_size=" + std::to_string(super_size) +
                           " must be 0 or a multiple of group_size=" + std::to_string(t.group_size) +
                           " that divides in_features")
                              .c_str());
  return super_size / t.group_size;
}

void add_code_term(BoundMatrix& self, int bits, AnyArray codes, const std::string& scale_type,
                   AnyArray scales, size_t group_size, FloatArray levels, float tensor_scale,
                   std::optional<AnyArray> zero_points, const std::string& offset_type,
                   std::optional<AnyArray> offsets, std::optional<AnyArray> selectors,
                   const std::string& packing, std::optional<AnyArray> multipliers, size_t multiplier_size,
                   std::optional<AnyArray> factors, std::optional<AnyArray> offset_factors,
                   size_t super_size) {
  Matrix& m = self.matrix;
  if (bits < 1 || bits > 8)
    throw nb::value_error(("Matrix: bits=" + std::to_string(bits) + ", must be 1 to 8").c_str());
  CodeTerm t = {};
  t.bits = bits;
  const size_t padded = m.chunks() * kChunk;
  if (group_size != 0 && (group_size % kSumStride != 0 || m.in_features % group_size != 0) &&
      group_size < m.in_features)
    throw nb::value_error(("Matrix: group_size=" + std::to_string(group_size) +
                           " must be a multiple of 16 that divides in_features=" +
                           std::to_string(m.in_features) + ", or 0 for the whole row")
                              .c_str());
  const bool row = group_size == 0 || group_size >= m.in_features;
  t.group_size = row ? padded : group_size;
  t.groups = row ? 1 : m.in_features / group_size;
  set_packing(t, packing, m.in_features);
  t.codes =
      static_cast<const uint8_t*>(checked("codes", codes, m.blocks() * code_block_bytes(t, m.chunks())));
  const size_t count = m.blocks() * t.groups * kBlockRows;
  t.scale_type = number_named(scale_type);
  t.offset_type = number_named(offset_type);
  if (factors) {
    t.span = span_of(t, super_size, offsets.has_value(), offset_factors.has_value());
    t.factors = static_cast<const uint8_t*>(checked("factors", *factors, count));
    if (offsets)
      t.offset_factors = static_cast<const uint8_t*>(checked("offset_factors", *offset_factors, count));
  }
  const size_t wide = t.factors ? count / t.span : count;  // scales and offsets that are no factors
  t.scales = checked("scales", scales, wide * number_bytes(t.scale_type));
  if (zero_points) t.zero_points = static_cast<const uint8_t*>(checked("zero_points", *zero_points, count));
  if (offsets) t.offsets = checked("offsets", *offsets, wide * number_bytes(t.offset_type));
  const size_t tables = levels.shape(0), entries = levels.shape(1), most = t.base3 ? 3 : size_t{1} << bits;
  if (tables < 1 || tables > 4 || entries < 2 || entries > most)
    throw nb::value_error(("Matrix: levels have shape [" + std::to_string(tables) + ", " +
                           std::to_string(entries) + "], must be [1 to 4, 2 to " + std::to_string(most) + "]")
                              .c_str());
  if (selectors) {
    if (bits > 4 || t.base3)
      throw nb::value_error("Matrix: several tables need codes of at most 4 bits in planes");
    t.selectors = static_cast<const uint8_t*>(checked("selectors", *selectors, count));
    for (size_t i = 0; i < count; ++i)
      if (t.selectors[i] >= tables)
        throw nb::value_error(("Matrix: selector " + std::to_string(t.selectors[i]) + " but there are " +
                               std::to_string(tables) + " tables")
                                  .c_str());
  } else if (tables > 1) {
    throw nb::value_error("Matrix: several tables need selectors");
  }
  set_levels(t, levels.data(), tables, entries, tensor_scale);
  if (multipliers) {
    set_multipliers(t, multiplier_size, entries, m.in_features);
    t.multipliers = static_cast<const uint8_t*>(
        checked("multipliers", *multipliers, m.blocks() * t.multiplier_groups * kTileRows));
  }
  if (tables_forced() && !has_table(t)) {
    const std::string notice =
        "LOWBIT_KERNEL=table: no tables for " + std::to_string(t.bits) +
        "-bit codes stored like this (they need 1 to 3 bits in planes, evenly spaced levels and groups of a "
        "multiple of 32 without multipliers); one token goes the direct way. Unset LOWBIT_KERNEL to have the "
        "faster kernel of each matrix chosen";
    if (PyErr_WarnEx(PyExc_RuntimeWarning, notice.c_str(), 1) < 0) throw nb::python_error();
  }
  m.codes.insert(m.codes.end() - static_cast<ptrdiff_t>(m.densified), t);  // one order on every ISA
  for (const auto& array : {std::optional<AnyArray>(codes), std::optional<AnyArray>(scales), zero_points,
                            offsets, selectors, multipliers, factors, offset_factors})
    if (array) self.arrays.push_back(nb::cast(*array));
}

void add_float_term(BoundMatrix& self, const std::string& type, AnyArray values) {
  Matrix& m = self.matrix;
  const Number number = number_named(type);
  if (number != Number::fp32 && number != Number::fp16 && number != Number::bf16)
    throw nb::value_error("Matrix: a float term is fp32, fp16 or bf16");
  const void* data =
      checked("values", values, m.blocks() * m.in_features * kBlockRows * number_bytes(number));
  m.floats.push_back({number, data, {}});
  self.arrays.push_back(nb::cast(values));
}

void add_entropy_term(BoundMatrix& self, AnyArray codes, AnyArray escapes, AnyArray offsets,
                      AnyArray exponents) {
  Matrix& m = self.matrix;
  EntropyCode code;
  code.codes = static_cast<const uint8_t*>(
      checked("codes", codes, m.blocks() * entropy_records(m.in_features) * kEntropyRecord));
  code.escapes = static_cast<const uint8_t*>(escapes.data());
  code.offsets = static_cast<const uint32_t*>(checked("offsets", offsets, (2 * m.blocks() + 1) * 4));
  code.exponents = static_cast<const uint8_t*>(checked("exponents", exponents, kEntropyExponents));
  const std::string error = entropy_error(code, m.blocks(), m.in_features, escapes.nbytes());
  if (!error.empty()) throw nb::value_error(("Matrix: entropy term: " + error).c_str());
  m.floats.push_back({Number::bf16, nullptr, code});
  for (const AnyArray& array : {codes, escapes, offsets, exponents}) self.arrays.push_back(nb::cast(array));
}

}  // namespace

void bind_terms(nb::class_<BoundMatrix>& matrix) {
  matrix
      .def("add_code_term", &add_code_term, nb::arg("bits"), nb::arg("codes"), nb::arg("scale_type"),
           nb::arg("scales"), nb::arg("group_size"), nb::arg("levels"), nb::arg("tensor_scale") = 1.0f,
           nb::arg("zero_points") = nb::none(), nb::arg("offset_type") = "fp16",
           nb::arg("offsets") = nb::none(), nb::arg("selectors") = nb::none(), nb::arg("packing") = "planes",
           nb::arg("multipliers") = nb::none(), nb::arg("multiplier_size") = 0,
           nb::arg("factors") = nb::none(), nb::arg("offset_factors") = nb::none(), nb::arg("super_size") = 0)
      .def("add_float_term", &add_float_term, nb::arg("type"), nb::arg("values"))
      .def("add_entropy_term", &add_entropy_term, nb::arg("codes"), nb::arg("escapes"), nb::arg("offsets"),
           nb::arg("exponents"));
}
