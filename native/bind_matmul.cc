// Python's view of products, threads and the machine's limits. Sizes of arrays are checked here and in
// bind_terms.cc; the kernels trust their arguments.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bind_matrix.h"
#include "crossover.h"
#include "isa.h"
#include "matmul.h"
#include "matmul_kernels.h"

namespace nb = nanobind;
using namespace lowbit;

namespace {

using IndexArray = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
nb::ndarray<nb::numpy, T> new_array(T** data, std::initializer_list<size_t> shape) {
  size_t count = 1;
  for (size_t n : shape) count *= n;
  *data = new T[std::max<size_t>(count, 1)];
  nb::capsule owner(*data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T>(*data, shape, owner);
}

// x times each matrix, side by side: float32 [n, sum of out_features]. The activations are quantized once.
nb::object multiply(FloatArray x, const std::vector<const BoundMatrix*>& bound, int activation_bits) {
  if (activation_bits != 8 && activation_bits != 16)
    throw nb::value_error(
        ("matmul: activation_bits=" + std::to_string(activation_bits) + ", must be 8 or 16").c_str());
  size_t width = 0;
  for (const BoundMatrix* b : bound) {
    const Matrix& m = b->matrix;
    if (x.shape(1) != m.in_features)
      throw nb::value_error(("matmul: x has " + std::to_string(x.shape(1)) +
                             " columns, the matrix in_features=" + std::to_string(m.in_features))
                                .c_str());
    if (!m.reads_integers() && !m.reads_values()) throw nb::value_error("matmul: the matrix has no terms");
    width += m.out_features;
  }
  float* out;
  auto result = new_array<float>(&out, {x.shape(0), width});
  if (x.shape(0) && !bound.empty()) {
    nb::gil_scoped_release release;
    std::vector<Product> products;
    for (size_t i = 0, column = 0; i < bound.size(); column += bound[i++]->matrix.out_features)
      products.push_back({&bound[i]->matrix, out + column, width});
    ActivationBuffer buffer;
    Activations a = buffer.prepare(x.shape(0), x.shape(1), activation_bits / 8, x.data());
    a.excluded = common_exclusion(products.data(), products.size());
    team()->run([&](const Member& member) {
      size_t first, last;
      member.share(a.tokens, &first, &last);
      quantize_rows(a, first, last);
      member.barrier();
      static thread_local MatmulScratch scratch;
      matmul(member, products.data(), products.size(), a, scratch);
    });
  }
  return nb::cast(result);
}

nb::object bound_matmul(FloatArray x, const BoundMatrix& bound, int activation_bits) {
  return multiply(x, {&bound}, activation_bits);
}

nb::object bound_matmul_group(FloatArray x, const std::vector<const BoundMatrix*>& bound,
                              int activation_bits) {
  if (bound.empty()) throw nb::value_error("matmul_group: no matrix; give at least one");
  for (const BoundMatrix* b : bound)
    if (!b) throw nb::value_error("matmul_group: a matrix is None");
  return multiply(x, bound, activation_bits);
}

nb::object bound_dequantize_rows(const BoundMatrix& bound, IndexArray rows) {
  const Matrix& m = bound.matrix;
  const int64_t limit = static_cast<int64_t>(m.out_features);
  for (size_t i = 0; i < rows.shape(0); ++i)
    if (rows.data()[i] < 0 || rows.data()[i] >= limit)
      throw nb::index_error(("dequantize_rows: row " + std::to_string(rows.data()[i]) + " of a matrix of " +
                             std::to_string(limit))
                                .c_str());
  float* out;
  auto result = new_array<float>(&out, {rows.shape(0), m.in_features});
  {
    nb::gil_scoped_release release;
    team()->run([&](const Member& member) {
      size_t first, last;
      member.share(rows.shape(0), &first, &last);
      for (size_t i = first; i < last; ++i)
        dequantize_row(m, static_cast<size_t>(rows.data()[i]), out + i * m.in_features);
    });
  }
  return nb::cast(result);
}

nb::object bound_dequantize(const BoundMatrix& bound) {
  const Matrix& m = bound.matrix;
  float* out;
  auto result = new_array<float>(&out, {m.out_features, m.in_features});
  {
    nb::gil_scoped_release release;
    team()->run([&](const Member& member) {
      size_t first, last;
      member.share(m.out_features, &first, &last);
      for (size_t row = first; row < last; ++row) dequantize_row(m, row, out + row * m.in_features);
    });
  }
  return nb::cast(result);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Best of repeated reads over a buffer, in bytes per second: the bound of decode.
double measure_bandwidth(size_t bytes, double seconds) {
  nb::gil_scoped_release release;
  const size_t size = round_up(std::max<size_t>(bytes, 1 << 20), 4096);
  std::unique_ptr<uint8_t[]> buffer(new uint8_t[size]);
  double best = 0;
  std::atomic<uint64_t> sink{0};
  const std::shared_ptr<Team> crew = team();
  crew->run([&](const Member& member) {
    size_t first, last;
    member.share(size / 4096, &first, &last);
    std::memset(buffer.get() + first * 4096, 1, (last - first) * 4096);
  });
  const auto begin = std::chrono::steady_clock::now();
  do {
    const auto start = std::chrono::steady_clock::now();
    crew->run([&](const Member& member) {
      size_t first, last;
      member.share(size / 4096, &first, &last);
      sink += matmul_kernels().read_memory(buffer.get() + first * 4096, (last - first) * 4096);
    });
    best = std::max(best, static_cast<double>(size) / seconds_since(start));
  } while (seconds_since(begin) < seconds);
  return sink.load() ? best : 0;
}

// Best rate of byte multiply-adds of all threads together: the bound of prefill.
double measure_int8_peak(double seconds) {
  nb::gil_scoped_release release;
  const MatmulKernels& kernels = matmul_kernels();
  constexpr size_t kRounds = 1 << 18;
  double best = 0;
  std::atomic<int64_t> sink{0};
  const std::shared_ptr<Team> crew = team();
  const auto begin = std::chrono::steady_clock::now();
  do {
    const auto start = std::chrono::steady_clock::now();
    crew->run([&](const Member&) { sink += kernels.dot_rounds(kRounds); });
    const double work = static_cast<double>(kRounds * kernels.dots_per_round * crew->size());
    best = std::max(best, work / seconds_since(start));
  } while (seconds_since(begin) < seconds);
  return best;
}

// Best rate of float32 multiply-adds of all threads together: the bound of many tokens with float weights.
double measure_float_peak(double seconds) {
  nb::gil_scoped_release release;
  const MatmulKernels& kernels = matmul_kernels();
  constexpr size_t kRounds = 1 << 18;
  double best = 0;
  std::vector<float> sums(1024);
  const std::shared_ptr<Team> crew = team();
  const auto begin = std::chrono::steady_clock::now();
  do {
    const auto start = std::chrono::steady_clock::now();
    crew->run([&](const Member& member) { sums[member.id] = kernels.fma_rounds(kRounds); });
    const double work = static_cast<double>(kRounds * kernels.fmas_per_round * crew->size());
    best = std::max(best, work / seconds_since(start));
  } while (seconds_since(begin) < seconds);
  return sums[0] > 0 ? best : 0;
}

}  // namespace

void bind_matmul(nb::module_& m) {
  if (const char* error = isa_error()) throw std::runtime_error(error);
  if (const char* error = kernel_error()) throw std::runtime_error(error);
  m.def("isa", [] { return std::string(isa_name(active_isa())); }, "The instruction set in use.");
  m.def(
      "supported_isas",
      [] {
        const char* names[kIsas];
        const int count = supported_isas(names);
        return std::vector<std::string>(names, names + count);
      },
      "Instruction sets that this build and CPU support, best last.");
  m.def("default_threads", &default_threads,
        "CPUs that affinity and the cgroup quota leave to this process.");
  m.def("threads", [] { return team()->size(); }, "Threads that a product uses.");
  m.def(
      "set_threads",
      [](size_t n) {
        if (n > 1024) throw nb::value_error("set_threads: at most 1024 threads");
        nb::gil_scoped_release release;
        set_team_size(n);
      },
      nb::arg("threads"), "Use this many threads from now on; 0 means the default.");

  nb::class_<BoundMatrix> matrix(m, "Matrix");
  matrix
      .def(
          "__init__",
          [](BoundMatrix* self, size_t out_features, size_t in_features) {
            constexpr size_t kLimit = size_t{1} << 31;
            if (!out_features || !in_features || out_features >= kLimit || in_features >= kLimit)
              throw nb::value_error(("Matrix: shape [" + std::to_string(out_features) + ", " +
                                     std::to_string(in_features) + "] is outside 1 .. 2^31 - 1")
                                        .c_str());
            new (self) BoundMatrix();
            self->matrix.out_features = out_features;
            self->matrix.in_features = in_features;
          },
          nb::arg("out_features"), nb::arg("in_features"))
      .def_prop_ro(
          "shape",
          [](const BoundMatrix& b) { return nb::make_tuple(b.matrix.out_features, b.matrix.in_features); })
      .def(
          "kernel",
          [](const BoundMatrix& b, size_t tokens, int activation_bits) {
            return kernels_of(b.matrix, tokens, activation_bits / 8);
          },
          nb::arg("tokens"), nb::arg("activation_bits") = 8,
          "The kernel that multiplies the codes with so many tokens: gemv or table for one (gemv+table: "
          "some terms each), few, gemm or bits (one-bit codes by lookups); float without codes. Then those "
          "of "
          "other terms: sparse, columns, low_rank, rows, entries; dense_mask where sparse codes became "
          "dense; gathered where the codes read the inputs in an order of their own.")
      .def_prop_ro("nbytes", [](const BoundMatrix& b) { return b.matrix.bytes(); });
  bind_terms(matrix);
  bind_side_terms(m, matrix);

  m.def(
      "crossovers", [] { return nb::make_tuple(crossovers().gemv, crossovers().few); },
      "The largest batches that the kernels gemv and few are taken for.");
  m.def(
      "set_crossovers",
      [](size_t gemv, size_t few) {
        if (gemv < 1 || few < 1 || gemv > kMostFew || few > kMostFew)
          throw nb::value_error(("set_crossovers: gemv=" + std::to_string(gemv) + ", few=" +
                                 std::to_string(few) + "; both must be 1 to " + std::to_string(kMostFew))
                                    .c_str());
        set_crossovers({gemv, few});
      },
      nb::arg("gemv"), nb::arg("few"), "Sets them, for all threads. Results do not depend on them.");
  m.def("tables", &tables,
        "Widths of codes that one token meets by table lookup: bit `bits`, or 8 + bits with 16-bit "
        "activations.");
  m.def("set_tables", &set_tables, nb::arg("widths"),
        "Sets them, for all threads. Results do not depend on them. LOWBIT_KERNEL goes before.");
  m.def("matmul", &bound_matmul, nb::arg("x"), nb::arg("matrix"), nb::arg("activation_bits") = 8,
        "x float32 [n, in] times the matrix: float32 [n, out].");
  m.def("matmul_group", &bound_matmul_group, nb::arg("x"), nb::arg("matrices"),
        nb::arg("activation_bits") = 8,
        "x float32 [n, in] times each of the matrices, side by side: float32 [n, sum of out].");
  m.def("dequantize", &bound_dequantize, nb::arg("matrix"), "The matrix as float32 [out, in].");
  m.def("dequantize_rows", &bound_dequantize_rows, nb::arg("matrix"), nb::arg("rows"),
        "Rows of the matrix, int64 [n], as float32 [n, in].");
  m.def("measure_bandwidth", &measure_bandwidth, nb::arg("bytes"), nb::arg("seconds"),
        "Best rate of reading a buffer of `bytes` with all threads, in bytes per second.");
  m.def("measure_int8_peak", &measure_int8_peak, nb::arg("seconds"),
        "Best rate of int8 multiply-adds of all threads together, per second.");
  m.def("measure_float_peak", &measure_float_peak, nb::arg("seconds"),
        "Best rate of float32 multiply-adds of all threads together, per second.");
}
