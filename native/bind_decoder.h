// What the bindings of the decoder, its steps, samplers and caches share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

#include "decoder.h"

namespace nb = nanobind;

using FloatVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct BoundDecoder {
  lowbit::Decoder decoder;
  std::vector<nb::object> matrices;  // owners of the weights
};

// An int32 array as it is; any other integers one by one, so that none is cut silently.
std::vector<int32_t> to_tokens(nb::handle tokens);

void bind_sampler(nb::module_& m);
void bind_steps(nb::module_& m, nb::class_<BoundDecoder>& decoder);
