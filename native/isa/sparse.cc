// Masked codes times one token: the stored codes of 64 places are cut out of a bit stream and spread over the
// places by their mask (vpexpandb), in registers. A step takes a load, a byte permutation, a shift by bytes'
// own amounts, a mask and the expansion before its dot product; where its codes begin is a running count of
// mask bits, whose chain is one addition per step.
#include "sparse.h"

#ifdef LOWBIT_ISA_avx512

#include "gemv.h"

namespace lowbit::LOWBIT_ISA {
namespace {

static_assert(!kSignedBytes, "weights are the unsigned operand here");
constexpr size_t kAhead = 2048;      // bytes that either stream is fetched ahead of its use
constexpr uint8_t kZeroEntry = 128;  // a table's level 0

// Codes [n, n + 64) of a stream of `bits`-wide codes, one per byte. Qword q of the result takes its eight
// codes from `bits` + 1 bytes; each byte of it is a field of that qword, `shift` bits higher at an odd start.
template <int bits>
class Stream {
 public:
  explicit Stream(const uint8_t* codes) : codes_(codes) {
    alignas(64) uint8_t bytes[64], fields[64];
    for (int i = 0; i < 64; ++i) {
      bytes[i] = static_cast<uint8_t>(bits * (i / 8) + i % 8);
      fields[i] = static_cast<uint8_t>(bits * (i % 8));
    }
    bytes_ = _mm512_load_si512(bytes);
    fields_ = _mm512_load_si512(fields);
  }
  LOWBIT_INLINE const uint8_t* at(size_t n) const { return codes_ + (n * bits >> 3); }
  LOWBIT_INLINE U8 load(size_t n) const {
    const __m512i raw = _mm512_loadu_si512(at(n));
    if constexpr (bits == 8) return {raw};
    const __m512i shift = _mm512_set1_epi8(static_cast<char>(n * bits & 7));
    const __m512i qwords = _mm512_permutexvar_epi8(bytes_, raw);
    const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_add_epi8(fields_, shift), qwords);
    return {_mm512_and_si512(codes, _mm512_set1_epi8((1 << bits) - 1))};
  }

 private:
  const uint8_t* codes_;
  __m512i bytes_, fields_;
};

LOWBIT_INLINE uint64_t load_mask(const uint8_t* p) {
  uint64_t mask;
  __builtin_memcpy(&mask, p, 8);
  return mask;
}

LOWBIT_INLINE U8 expand(U8 packed, uint64_t mask, U8 rest) {
  return {_mm512_mask_expand_epi8(rest.v, mask, packed.v)};
}

template <int bits, Map map, int limbs>
void gemv(const SparseTerm& s, size_t block, const Activations& a, size_t token, float* acc) {
  constexpr int weight_limbs = kWeightLimbs<map>;
  const CodeTerm& t = s.term;
  const size_t padded = a.padded;
  const Stream<bits> stream(s.codes + s.starts[block]);
  const uint8_t* mask = s.mask + block * (padded / kChunk) * 128;
  const int8_t* x_high = a.high + token * padded;
  const int8_t* x_low = limbs == 2 ? a.low + token * padded : nullptr;
  const U8 zero = set1_u8(map == Map::linear ? s.zero : kZeroEntry);
  F32 f[2] = {load(acc), load(acc + kTileRows)}, run[2] = {};
  const Runs runs = runs_of(t);
  size_t group = 0, group_end = t.group_size, n = 0;
  for (size_t k = 0; k < padded;) {
    const size_t end = segment_end(k, group_end, padded);
    const SegmentScale scale = segment_scale(a, token, k, end);
    const bool first = runs.first(k, group_end - t.group_size), last = runs.last(end, group_end, padded);
    I32 dot[2][weight_limbs][limbs];
    unroll<2 * weight_limbs>([&](auto i) LOWBIT_UNROLLED {
      dot[i % 2][i / 2][0] = zero_i32();
      dot[i % 2][i / 2][limbs - 1] = start<bits, map, true>(t.base, scale);
    });
    for (size_t c = k; c < end; c += kChunk) {
      __builtin_prefetch(mask + kAhead, 0, 3);
      __builtin_prefetch(mask + kAhead + 64, 0, 3);
      for (size_t line = 0; line <= bits; ++line) __builtin_prefetch(stream.at(n) + kAhead + 64 * line, 0, 3);
      unroll<2 * kSteps>([&](auto i) LOWBIT_UNROLLED {
        constexpr size_t tile = i / kSteps, step = i % kSteps;
        const uint64_t kept = load_mask(mask + 8 * i);
        U8 high = stream.load(n), low;
        n += static_cast<size_t>(__builtin_popcountll(kept));
        if constexpr (map == Map::table2) low = expand(lookup<bits>(t.low, high), kept, zero);
        if constexpr (map != Map::linear) high = lookup<bits>(t.high, high);
        high = expand(high, kept, zero);
        const I32 x = broadcast4(x_high + c + 4 * step);
        dot[tile][0][0] = dot4(dot[tile][0][0], high, x);
        if constexpr (weight_limbs == 2) dot[tile][1][0] = dot4(dot[tile][1][0], low, x);
        if constexpr (limbs == 2) {
          const I32 y = broadcast4(x_low + c + 4 * step);
          dot[tile][0][1] = dot4(dot[tile][0][1], high, y);
          if constexpr (weight_limbs == 2) dot[tile][1][1] = dot4(dot[tile][1][1], low, y);
        }
      });
      mask += 128;
    }
    unroll<2>([&](auto tile) LOWBIT_UNROLLED {
      const TileScale w = tile_scale<true>(t, block, group, tile);
      add_total<true>(f[tile], run[tile], segment_total<map, true>(dot[tile], t, w, scale), first, last,
                      runs.weights_outer, t, w, scale);
    });
    if (end == group_end) {
      ++group;
      group_end += t.group_size;
    }
    k = end;
  }
  store(acc, f[0]);
  store(acc + kTileRows, f[1]);
}

template <int bits>
void spread(const SparseTerm& s, size_t block, size_t chunks, uint8_t* codes) {
  const Stream<bits> stream(s.codes + s.starts[block]);
  const uint8_t* mask = s.mask + block * chunks * 128;
  const U8 zero = set1_u8(s.zero);
  size_t n = 0;
  for (size_t i = 0; i < chunks * 2 * kSteps; ++i) {
    const uint64_t kept = load_mask(mask + 8 * i);
    store_u8(codes + 64 * i, expand(stream.load(n), kept, zero));
    n += static_cast<size_t>(__builtin_popcountll(kept));
  }
}

using Gemv = void (*)(const SparseTerm&, size_t, const Activations&, size_t, float*);

template <int bits>
Gemv gemv_of(const CodeTerm& t, int limbs) {
  if (t.map == Map::table1) return limbs == 2 ? gemv<bits, Map::table1, 2> : gemv<bits, Map::table1, 1>;
  if (t.map == Map::table2) return limbs == 2 ? gemv<bits, Map::table2, 2> : gemv<bits, Map::table2, 1>;
  return limbs == 2 ? gemv<bits, Map::linear, 2> : gemv<bits, Map::linear, 1>;
}

// Calls f with the width of the codes as a compile-time constant.
template <typename F>
auto with_bits(int bits, F f) {
  switch (bits) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, 5>());
    case 6:
      return f(std::integral_constant<int, 6>());
    case 7:
      return f(std::integral_constant<int, 7>());
    default:
      return f(std::integral_constant<int, 8>());
  }
}

}  // namespace

void sparse_gemv(const SparseTerm& s, size_t block, const Activations& a, size_t token, float* acc) {
  with_bits(s.term.bits, [&](auto bits) { return gemv_of<bits>(s.term, a.limbs); })(s, block, a, token, acc);
}

void sparse_expand(const SparseTerm& s, size_t block, size_t chunks, uint8_t* codes) {
  with_bits(s.term.bits, [&](auto bits) { spread<bits>(s, block, chunks, codes); });
}

}  // namespace lowbit::LOWBIT_ISA

#endif
