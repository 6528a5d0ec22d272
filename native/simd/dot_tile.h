// The innermost loop of the product of many tokens: dot products of 32 rows with up to kTileColumns tokens,
// all sums in registers.
#pragma once

#include "simd/signed_dot.h"

namespace lowbit::LOWBIT_ISA {

#if defined(LOWBIT_ISA_avx512)
constexpr size_t kTileColumns =
    6;  // 2 x 6 integer and 2 x 6 float sums, 2 weights, 1 activation: 27 registers
#elif defined(LOWBIT_ISA_avxvnni)
constexpr size_t kTileColumns = 6;  // one tile of rows at a time: 2 x 6 sums, 2 weights, 1 activation of 16
#elif defined(LOWBIT_ISA_avx2)
constexpr size_t kTileColumns =
    4;  // one tile of rows at a time: 2 x 4 sums of 16 bits, 2 weights, 1 activation
#else
constexpr size_t kTileColumns = kGemmColumns;
#endif

// sum[c][tile] += dot products of `inputs` inputs, a multiple of 16. weights: [step][2 tiles][64], signed;
// codes: a row of activations every `stride` bytes.
#if defined(LOWBIT_ISA_avx2) || defined(LOWBIT_ISA_avxvnni)

LOWBIT_INLINE __m256i load_half(const int8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// `steps` steps of one tile of rows. Sums of 16 bits, of at most `depth` steps, are widened at the end.
template <size_t columns, int depth, size_t steps>
LOWBIT_INLINE void add_steps(I32 (&sum)[columns][2], size_t tile, const int8_t* w, const int8_t* x,
                             size_t stride) {
  __m256i pairs[columns][2];
  unroll<steps>([&](auto step) LOWBIT_UNROLLED {
    __m256i w0 = load_half(w + step * 128), w1 = load_half(w + step * 128 + 32);
    // Loaded once: left to itself GCC loads them again in every product, and two loads a cycle are the limit.
    if constexpr (kDepths && depth > 1) asm("" : "+x"(w0), "+x"(w1));
    unroll<columns>([&](auto c) LOWBIT_UNROLLED {
      const __m256i v = activations4<depth>(x + c * stride + 4 * step).a;
      if constexpr (kDepths && depth > 1) {
        const __m256i p0 = _mm256_maddubs_epi16(v, w0), p1 = _mm256_maddubs_epi16(v, w1);
        pairs[c][0] = step ? _mm256_add_epi16(pairs[c][0], p0) : p0;
        pairs[c][1] = step ? _mm256_add_epi16(pairs[c][1], p1) : p1;
        // In this order: GCC makes a tree of the additions, for which there are not enough registers.
        asm("" : "+x"(pairs[c][0]), "+x"(pairs[c][1]));
      } else {
        sum[c][tile].a = dot_signed_half<depth>(sum[c][tile].a, w0, v);
        sum[c][tile].b = dot_signed_half<depth>(sum[c][tile].b, w1, v);
      }
    });
  });
  if constexpr (kDepths && depth > 1) {
    const __m256i ones = _mm256_set1_epi16(1);
    unroll<columns>([&](auto c) LOWBIT_UNROLLED {
      sum[c][tile].a = _mm256_add_epi32(sum[c][tile].a, _mm256_madd_epi16(pairs[c][0], ones));
      sum[c][tile].b = _mm256_add_epi32(sum[c][tile].b, _mm256_madd_epi16(pairs[c][1], ones));
    });
  }
}

// One tile of rows after the other, since sixteen registers do not hold the sums of both.
template <size_t columns, int depth>
LOWBIT_INLINE void add_dots(I32 (&sum)[columns][2], const int8_t* weights, const int8_t* codes, size_t stride,
                            size_t inputs) {
  unroll<2>([&](auto tile) LOWBIT_UNROLLED {
    const int8_t *w = weights + tile * 64, *x = codes;
    const int8_t* const stop = codes + inputs;
    if constexpr (depth == 8) {
      for (; stop - x >= 32; x += 32, w += 8 * 128) add_steps<columns, depth, 8>(sum, tile, w, x, stride);
    }
    for (; x != stop; x += 16, w += 4 * 128) add_steps<columns, depth, 4>(sum, tile, w, x, stride);
  });
}

#else

template <size_t columns, int depth>
LOWBIT_INLINE void add_dots(I32 (&sum)[columns][2], const int8_t* weights, const int8_t* codes, size_t stride,
                            size_t inputs) {
  const uint8_t* w = reinterpret_cast<const uint8_t*>(weights);
  const int8_t* const stop = codes + inputs;
  do {  // four steps a round leave the compiler few copies of registers
    unroll<4>([&](auto step) LOWBIT_UNROLLED {
      const U8 w0 = load_u8(w + step * 128), w1 = load_u8(w + step * 128 + 64);
      unroll<columns>([&](auto c) LOWBIT_UNROLLED {
        const I32 x = activations4<depth>(codes + c * stride + 4 * step);
        sum[c][0] = dot_signed<depth>(sum[c][0], w0, x);
        sum[c][1] = dot_signed<depth>(sum[c][1], w1, x);
      });
    });
    w += 4 * 128;
    codes += 16;
  } while (codes != stop);
}

#endif

#if defined(LOWBIT_ISA_avx512)

// Six tokens, in assembly: with intrinsics GCC 12 keeps the twelve sums in registers only by luck. Per step 2
// loads of weights, 6 broadcasts that are exclusive ors on the ports the dot products leave free, 12 dot
// products: 6 cycles at two dot products a cycle.
#define LOWBIT_DOT_PAIR(x, even, odd)  \
  "vpxord " x                          \
  "%{1to16%}, %[top], %%zmm31\n\t"     \
  "vpdpbusd %%zmm29, %%zmm31, %[" even \
  "]\n\t"                              \
  "vpdpbusd %%zmm30, %%zmm31, %[" odd "]\n\t"
#define LOWBIT_DOT_STEP(w0, w1, x)                                                                \
  "vmovdqu64 " w0                                                                                 \
  "(%[w]), %%zmm29\n\t"                                                                           \
  "vmovdqu64 " w1 "(%[w]), %%zmm30\n\t" LOWBIT_DOT_PAIR(x "(%[x])", "a0", "b0")                   \
      LOWBIT_DOT_PAIR(x "(%[x],%[s])", "a1", "b1") LOWBIT_DOT_PAIR(x "(%[x],%[s],2)", "a2", "b2") \
          LOWBIT_DOT_PAIR(x "(%[y])", "a3", "b3") LOWBIT_DOT_PAIR(x "(%[y],%[s])", "a4", "b4")    \
              LOWBIT_DOT_PAIR(x "(%[y],%[s],2)", "a5", "b5")
template <>
LOWBIT_INLINE void add_dots<6, 1>(I32 (&sum)[6][2], const int8_t* weights, const int8_t* codes, size_t stride,
                                  size_t inputs) {
  const int8_t* second = codes + 3 * stride;
  const int8_t* const stop = codes + inputs;
  const __m512i top = _mm512_set1_epi8(static_cast<char>(0x80));
  do {
    asm volatile(
        LOWBIT_DOT_STEP("0", "64", "0")      //
        LOWBIT_DOT_STEP("128", "192", "4")   //
        LOWBIT_DOT_STEP("256", "320", "8")   //
        LOWBIT_DOT_STEP("384", "448", "12")  //
        : [a0] "+v"(sum[0][0].v), [b0] "+v"(sum[0][1].v), [a1] "+v"(sum[1][0].v), [b1] "+v"(sum[1][1].v),
          [a2] "+v"(sum[2][0].v), [b2] "+v"(sum[2][1].v), [a3] "+v"(sum[3][0].v), [b3] "+v"(sum[3][1].v),
          [a4] "+v"(sum[4][0].v), [b4] "+v"(sum[4][1].v), [a5] "+v"(sum[5][0].v), [b5] "+v"(sum[5][1].v)
        : [w] "r"(weights), [x] "r"(codes), [y] "r"(second), [s] "r"(stride), [top] "v"(top)
        : "zmm29", "zmm30", "zmm31", "memory");
    weights += 4 * 128;
    codes += 16;
    second += 16;
  } while (codes != stop);
}
#undef LOWBIT_DOT_STEP
#undef LOWBIT_DOT_PAIR

#endif

}  // namespace lowbit::LOWBIT_ISA
