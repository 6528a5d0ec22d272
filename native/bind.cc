// The Python module lowbit._native: everything below this file is plain C++.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_matmul(nb::module_& m);
__attribute__((weak)) void bind_decoder(nb::module_& m);
__attribute__((weak)) void bind_entropy(nb::module_& m);
__attribute__((weak)) void bind_export(nb::module_& m);
__attribute__((weak)) void bind_kv(nb::module_& m);
__attribute__((weak)) void bind_quantize(nb::module_& m);
__attribute__((weak)) void bind_repack(nb::module_& m);

NB_MODULE(_native, m) {
  // A program may end with products in a graph of torch, which frees them after nanobind has looked.
  nb::set_leak_warnings(false);
  m.doc() = "Native kernels of lowbit: matrix products, the decoder step, quantization.";
  bind_matmul(m);
  if (bind_decoder) bind_decoder(m);
  if (bind_kv) bind_kv(m);
  if (bind_entropy) bind_entropy(m);
  if (bind_export) bind_export(m);
  if (bind_quantize) bind_quantize(m);
  if (bind_repack) bind_repack(m);
}
