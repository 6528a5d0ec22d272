// Every operation of simd.h behind one signature, so that two instruction sets can be compared.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit::selftest {

// Operands of one call. Nothing here is aligned to more than four bytes: no operation may ask for it.
struct alignas(64) Case {
  uint8_t misalign[4];
  float f[4][16];
  int32_t i[2][16];
  uint8_t u[2][64];
  uint8_t table[256];
  uint16_t h[16];
  size_t n;           // 0..16, lanes of load_n and store_n
  const float* tail;  // the first n of f[0], ending where readable memory ends
};

constexpr size_t kResultBytes = 256;  // an operation writes the front, the rest must stay as it was

// What the operands of an operation may be. fp16: anything, and every fp16 pattern besides.
// dot_127: activations above -128.
enum class Domain { any, integral, exponent, index16, index64, dot, dot_small, dot_127, fp16 };
// exact: all bytes. number: floats, where every NaN equals every NaN: its sign and payload are the CPU's.
enum class Compare { exact, number };

struct Operation {
  const char* name;
  Domain domain;
  Compare compare;
  void (*run)(const Case& c, uint8_t* out);
};

struct Operations {
  const Operation* list;
  size_t count;
};

}  // namespace lowbit::selftest

// One per instruction set: operations.cc is compiled once for each.
namespace lowbit::scalar {
selftest::Operations operations();
}
namespace lowbit::avx2 {
selftest::Operations operations();
}
namespace lowbit::avxvnni {
selftest::Operations operations();
}
namespace lowbit::avx512 {
selftest::Operations operations();
}
namespace lowbit::neon {
selftest::Operations operations();
}
namespace lowbit::neondot {
selftest::Operations operations();
}
