// Python's view of the coding of bfloat16 weights.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <string>

#include "entropy.h"
#include "matrix.h"
#include "team.h"

namespace nb = nanobind;
using namespace lowbit;

namespace {

using Values = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using Offsets = nb::ndarray<const uint32_t, nb::c_contig, nb::device::cpu>;

// A NumPy array that takes the vector's memory over.
template <typename T>
nb::ndarray<nb::numpy, T> array_of(std::vector<T>&& values, std::initializer_list<size_t> shape) {
  auto* kept = new std::vector<T>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::ndarray<nb::numpy, T>(kept->data(), shape, owner);
}

nb::tuple bound_encode(const Values& values) {
  const size_t out_features = values.shape(0), in_features = values.shape(1);
  EntropyArrays a;
  {
    nb::gil_scoped_release release;
    a = entropy_encode(values.data(), out_features, in_features);
  }
  const size_t blocks = round_up(out_features, kBlockRows) / kBlockRows;
  const size_t escapes = a.escapes.size(), offsets = a.offsets.size();
  if (escapes >> 32)
    throw nb::value_error("entropy_encode: escapes of 4 GB and more; split the matrix by rows");
  return nb::make_tuple(array_of(std::move(a.codes), {blocks, entropy_records(in_features), kEntropyRecord}),
                        array_of(std::move(a.escapes), {escapes}), array_of(std::move(a.offsets), {offsets}),
                        array_of(std::move(a.exponents), {kEntropyExponents}));
}

nb::object bound_decode(const Bytes& codes, const Bytes& escapes, const Offsets& offsets,
                        const Bytes& exponents, size_t out_features, size_t in_features) {
  const size_t blocks = round_up(out_features, kBlockRows) / kBlockRows;
  if (codes.nbytes() != blocks * entropy_records(in_features) * kEntropyRecord ||
      offsets.size() != 2 * blocks + 1 || exponents.size() != kEntropyExponents)
    throw nb::value_error("entropy_decode: sizes of the arrays do not fit the matrix");
  const EntropyCode code = {codes.data(), escapes.data(), offsets.data(), exponents.data()};
  const std::string error = entropy_error(code, blocks, in_features, escapes.nbytes());
  if (!error.empty()) throw nb::value_error(("entropy_decode: " + error).c_str());
  std::vector<uint16_t> out(out_features * in_features);
  {
    nb::gil_scoped_release release;
    team()->run([&](const Member& member) {
      size_t first, last;
      member.share(blocks, &first, &last);
      for (size_t block = first; block < last; ++block)
        entropy_block(code, in_features, block, std::min(kBlockRows, out_features - block * kBlockRows),
                      out.data() + block * kBlockRows * in_features);
    });
  }
  return nb::cast(array_of(std::move(out), {out_features, in_features}));
}

}  // namespace

void bind_entropy(nb::module_& m) {
  m.def("entropy_encode", &bound_encode, nb::arg("values"),
        "The bits of bfloat16 weights, uint16 [out, in], as (codes, escapes, offsets, exponents).");
  m.def("entropy_decode", &bound_decode, nb::arg("codes"), nb::arg("escapes"), nb::arg("offsets"),
        nb::arg("exponents"), nb::arg("out_features"), nb::arg("in_features"), "The inverse.");
}
