// The Python object around a Matrix: it keeps the arrays alive that the matrix points into.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <vector>

#include "matrix.h"

namespace lowbit {

struct BoundMatrix {
  Matrix matrix;
  std::vector<nanobind::object> arrays;  // owners of the memory
};

using AnyArray = nanobind::ndarray<nanobind::ro, nanobind::c_contig, nanobind::device::cpu>;
using FloatArray =
    nanobind::ndarray<const float, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

Number number_named(const std::string& name);
// The array's memory if it has `bytes` bytes; else a ValueError that names it.
const void* checked(const char* what, const AnyArray& array, size_t bytes);
// Chooses how the levels of a term become integers: levels [tables][count].
void set_levels(CodeTerm& t, const float* levels, size_t tables, size_t count, float tensor_scale);

}  // namespace lowbit

// Adds the calls that give a matrix its terms.
void bind_terms(nanobind::class_<lowbit::BoundMatrix>& matrix);
void bind_side_terms(nanobind::module_& m, nanobind::class_<lowbit::BoundMatrix>& matrix);
