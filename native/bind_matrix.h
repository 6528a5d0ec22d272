// The Python object around a Matrix: it keeps the arrays alive that the matrix points into.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "matrix.h"

namespace lowbit {

struct BoundMatrix {
  Matrix matrix;
  std::vector<nanobind::object> arrays;  // owners of the memory
};

}  // namespace lowbit

// Adds the calls that give a matrix its terms.
void bind_terms(nanobind::class_<lowbit::BoundMatrix>& matrix);
