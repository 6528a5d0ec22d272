// The operations of simd.h for one instruction set (LOWBIT_ISA).
#include "operations.h"

#include <cstring>

#include "simd/lookups.h"
#include "simd/simd.h"

namespace lowbit::LOWBIT_ISA {
namespace {

using selftest::Case;
using selftest::Compare;
using selftest::Domain;
using selftest::Operation;

LOWBIT_INLINE F32 f(const Case& c, int k) { return load(c.f[k]); }
LOWBIT_INLINE I32 i(const Case& c, int k) { return load_i32(c.i[k]); }
LOWBIT_INLINE U8 u(const Case& c, int k) { return load_u8(c.u[k]); }
LOWBIT_INLINE void put(uint8_t* out, F32 v) { store(reinterpret_cast<float*>(out), v); }
LOWBIT_INLINE void put(uint8_t* out, I32 v) { store_i32(reinterpret_cast<int32_t*>(out), v); }
LOWBIT_INLINE void put(uint8_t* out, U8 v) { store_u8(out, v); }
LOWBIT_INLINE void put(uint8_t* out, float v) { *reinterpret_cast<float*>(out) = v; }

// Shifts by every count, one result after the other would not fit: the three that a kernel may use together.
template <int n>
LOWBIT_INLINE void put_shifts(uint8_t* out, U8 v) {
  put(out, shift_right<n>(v));
  put(out + 64, shift_left<n>(v));
}
template <int first>
LOWBIT_INLINE void put_shifts_i32(uint8_t* out, I32 v) {
  put(out, shift_left<first>(v));
  put(out + 64, shift_left<first + 1>(v));
  put(out + 128, shift_left<first + 2>(v));
  put(out + 192, shift_left<first + 3>(v));
}

// As many steps as a run of weights up to `top` may have, all of them alike: the largest sums there are.
template <int top>
LOWBIT_INLINE I32 run_of(const Case& c) {
  static_assert(fitting_steps(top) <= run_steps(top), "a run is at least what fits int16");
  const U8 w = and_(u(c, 0), set1_u8(top));
  Run run = begin_run(i(c, 0));
  for (size_t step = 0; step < fitting_steps(top); ++step) run = dot_run(run, w, i(c, 1));
  return end_run(i(c, 0), run);
}

// Four vectors of each tile, the most that Lookups hold, with parts of entries up to the largest.
LOWBIT_INLINE void put_lookups(uint8_t* out, const Case& c) {
  uint8_t table[256];
  for (int k = 0; k < 256; ++k) table[k] = c.table[k] % (k & 64 ? 24 : 32);
  if (c.n == 0) std::memset(table, 31, 64), std::memset(table + 128, 31, 64);
  Lookups sums = no_lookups();
  for (int k = 0; k < 4; ++k) add_lookups(sums, load_nibbles(c.u[k & 1], c.u[1]), table);
  I32 tile[2];
  end_lookups(tile, sums);
  put(out, tile[0]);
  put(out + 64, tile[1]);
}

#define LOWBIT_OP(name, domain, compare, statement) \
  {name, Domain::domain, Compare::compare, []([[maybe_unused]] const Case& c, uint8_t* out) { statement; }}

const Operation kOperations[] = {
    // F32
    LOWBIT_OP("load, store", any, exact, put(out, load(c.f[0]))),
    LOWBIT_OP("load_n", any, exact, put(out, load_n(c.tail, c.n))),
    LOWBIT_OP("store_n", any, exact, store_n(reinterpret_cast<float*>(out), f(c, 0), c.n)),
    LOWBIT_OP("set1", any, exact, put(out, set1(c.f[0][3]))),
    LOWBIT_OP("zero_f32", any, exact, put(out, zero_f32())),
    LOWBIT_OP("add", any, number, put(out, add(f(c, 0), f(c, 1)))),
    LOWBIT_OP("sub", any, number, put(out, sub(f(c, 0), f(c, 1)))),
    LOWBIT_OP("mul", any, number, put(out, mul(f(c, 0), f(c, 1)))),
    LOWBIT_OP("mul then add", any, number, put(out, add(mul(f(c, 0), f(c, 1)), f(c, 2)))),
    LOWBIT_OP("div", any, number, put(out, div(f(c, 0), f(c, 1)))),
    LOWBIT_OP("fma", any, number, put(out, fma(f(c, 0), f(c, 1), f(c, 2)))),
    LOWBIT_OP("min", any, exact, put(out, min(f(c, 0), f(c, 1)))),
    LOWBIT_OP("max", any, exact, put(out, max(f(c, 0), f(c, 1)))),
    LOWBIT_OP("sqrt", any, number, put(out, sqrt(f(c, 0)))),
    LOWBIT_OP("abs", any, exact, put(out, abs(f(c, 0)))),
    LOWBIT_OP("round_even", any, number, put(out, round_even(f(c, 0)))),
    LOWBIT_OP("floor", any, number, put(out, floor(f(c, 0)))),
    LOWBIT_OP("to_i32", integral, exact, put(out, to_i32(f(c, 0)))),
    LOWBIT_OP("to_f32", any, exact, put(out, to_f32(i(c, 0)))),
    LOWBIT_OP("bits", any, exact, put(out, bits(f(c, 0)))),
    LOWBIT_OP("from_bits", any, exact, put(out, from_bits(i(c, 0)))),
    LOWBIT_OP("select_gt", any, exact, put(out, select_gt(f(c, 0), f(c, 1), f(c, 2), f(c, 3)))),
    LOWBIT_OP("load_fp16", fp16, exact, put(out, load_fp16(c.h))),
    LOWBIT_OP("load_bf16", any, exact, put(out, load_bf16(c.h))),
    LOWBIT_OP("store_fp16", fp16, exact, store_fp16(reinterpret_cast<uint16_t*>(out), f(c, 0))),
    LOWBIT_OP("reduce_add", any, number, put(out, reduce_add(f(c, 0)))),
    LOWBIT_OP("reduce_max", any, exact, put(out, reduce_max(f(c, 0)))),
    LOWBIT_OP("reduce_min", any, exact, put(out, reduce_min(f(c, 0)))),
    // I32
    LOWBIT_OP("load_i32, store_i32", any, exact, put(out, load_i32(c.i[0]))),
    LOWBIT_OP("set1_i32", any, exact, put(out, set1_i32(c.i[0][5]))),
    LOWBIT_OP("zero_i32", any, exact, put(out, zero_i32())),
    LOWBIT_OP("add i32", any, exact, put(out, add(i(c, 0), i(c, 1)))),
    LOWBIT_OP("sub i32", any, exact, put(out, sub(i(c, 0), i(c, 1)))),
    LOWBIT_OP("mul i32", any, exact, put(out, mul(i(c, 0), i(c, 1)))),
    LOWBIT_OP("and_ i32", any, exact, put(out, and_(i(c, 0), i(c, 1)))),
    LOWBIT_OP("shift_left<0..3> i32", any, exact, put_shifts_i32<0>(out, i(c, 0))),
    LOWBIT_OP("shift_left<4..7> i32", any, exact, put_shifts_i32<4>(out, i(c, 0))),
    LOWBIT_OP("shift_left<13..16> i32", any, exact, put_shifts_i32<13>(out, i(c, 0))),
    LOWBIT_OP("shift_left<28..31> i32", any, exact, put_shifts_i32<28>(out, i(c, 0))),
    LOWBIT_OP("load_u8_i32", any, exact, put(out, load_u8_i32(c.u[0]))),
    LOWBIT_OP("store_i8", any, exact, store_i8(reinterpret_cast<int8_t*>(out), i(c, 0))),
    LOWBIT_OP("scale_exponent", exponent, exact, put(out, scale_exponent(i(c, 0)))),
    // U8
    LOWBIT_OP("load_u8, store_u8", any, exact, put(out, load_u8(c.u[0]))),
    LOWBIT_OP("set1_u8", any, exact, put(out, set1_u8(c.u[0][7]))),
    LOWBIT_OP("and_", any, exact, put(out, and_(u(c, 0), u(c, 1)))),
    LOWBIT_OP("or_", any, exact, put(out, or_(u(c, 0), u(c, 1)))),
    LOWBIT_OP("xor_", any, exact, put(out, xor_(u(c, 0), u(c, 1)))),
    LOWBIT_OP("shift<0> u8", any, exact, put_shifts<0>(out, u(c, 0))),
    LOWBIT_OP("shift<1> u8", any, exact, put_shifts<1>(out, u(c, 0))),
    LOWBIT_OP("shift<2> u8", any, exact, put_shifts<2>(out, u(c, 0))),
    LOWBIT_OP("shift<3> u8", any, exact, put_shifts<3>(out, u(c, 0))),
    LOWBIT_OP("shift<4> u8", any, exact, put_shifts<4>(out, u(c, 0))),
    LOWBIT_OP("shift<5> u8", any, exact, put_shifts<5>(out, u(c, 0))),
    LOWBIT_OP("shift<6> u8", any, exact, put_shifts<6>(out, u(c, 0))),
    LOWBIT_OP("shift<7> u8", any, exact, put_shifts<7>(out, u(c, 0))),
    LOWBIT_OP("spread_rows", any, exact, put(out, spread_rows(c.u[0]))),
    LOWBIT_OP("lookup16", index16, exact, put(out, lookup16(c.table, u(c, 0)))),
    LOWBIT_OP("lookup64", index64, exact, put(out, lookup64(c.table, u(c, 0)))),
    LOWBIT_OP("lookup256", any, exact, put(out, lookup256(c.table, u(c, 0)))),
    // dot
    LOWBIT_OP("broadcast4", any, exact, put(out, broadcast4(reinterpret_cast<const int8_t*>(c.u[0]) + 1))),
    LOWBIT_OP("dot4", dot, exact, put(out, dot4(i(c, 0), u(c, 0), i(c, 1)))),
    LOWBIT_OP("dot4 of broadcast4", dot, exact,
              put(out, dot4(i(c, 0), u(c, 0), broadcast4(reinterpret_cast<const int8_t*>(c.u[1]))))),
    LOWBIT_OP("dot4_small", dot_small, exact, put(out, dot4_small(i(c, 0), u(c, 0), i(c, 1)))),
    LOWBIT_OP("dot4_signed", dot_127, exact, put(out, dot4_signed(i(c, 0), u(c, 0), i(c, 1)))),
    LOWBIT_OP("run of 1 bit", dot_127, exact, put(out, run_of<1>(c))),
    LOWBIT_OP("run of 3 bits", dot_127, exact, put(out, run_of<7>(c))),
    LOWBIT_OP("run of 4 bits", dot_127, exact, put(out, run_of<15>(c))),
    LOWBIT_OP("run of 5 bits", dot_127, exact, put(out, run_of<31>(c))),
    LOWBIT_OP("run of 6 bits", dot_127, exact, put(out, run_of<63>(c))),
    LOWBIT_OP("run of 7 bits", dot_127, exact, put(out, run_of<127>(c))),
    LOWBIT_OP("lookups of nibbles", any, exact, put_lookups(out, c)),
};

#undef LOWBIT_OP

}  // namespace

selftest::Operations operations() { return {kOperations, sizeof kOperations / sizeof *kOperations}; }

}  // namespace lowbit::LOWBIT_ISA
