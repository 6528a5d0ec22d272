// Products of small matrices of every kind, as checksums: equal on every instruction set, or a kernel rounds
// differently. Also checks each product against its matrix decoded row by row and summed in double.
//
//   LOWBIT_ISA=avx2 matmul_selftest   one line a case: description, checksum; exit code 1 if a product is
//   wrong matmul_selftest --isas            the instruction sets of this build and CPU, best last
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "crossover.h"
#include "isa.h"
#include "matmul.h"

namespace lowbit::selftest {
namespace {

// A linear congruential generator, and floats made of its integers: the same data on every machine.
struct Random {
  uint64_t state = 20240607;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  uint32_t below(uint32_t n) { return next() % n; }
  float number() { return (static_cast<float>(below(1 << 20)) - 524288.0f) / 65536.0f; }
};

// Bytes that a kernel may read, followed by bytes that would spoil the result (NaN in every float type).
struct Bytes {
  std::vector<uint8_t> memory;
  explicit Bytes(size_t bytes) : memory(bytes + 256, 0xff) {}
  uint8_t* data() { return memory.data(); }
};

// A matrix with the memory that its terms point into.
struct Stored {
  Matrix matrix;
  std::vector<Bytes> memory;
};

const Number kScaleTypes[] = {Number::fp16, Number::fp32, Number::e8m0, Number::e4m3};
const char* const kNumberNames[] = {"fp32", "fp16", "bf16", "e8m0", "e4m3"};
enum class Kind { linear, stepped, table1, table2 };
const char* const kKindNames[] = {"linear", "stepped", "table1", "table2"};

// count numbers of a type, positive and negative where the type has a sign, none larger than 4.
const void* random_numbers(Stored& s, Random& random, Number type, size_t count) {
  s.memory.emplace_back(count * number_bytes(type));
  uint8_t* p = s.memory.back().data();
  for (size_t i = 0; i < count; ++i) {
    const uint32_t sign = random.below(2);
    if (type == Number::e8m0) {
      p[i] = static_cast<uint8_t>(118 + random.below(12));
    } else if (type == Number::e4m3) {
      p[i] = static_cast<uint8_t>(sign << 7 | random.below(72));
    } else if (type == Number::fp16) {
      const uint16_t half = static_cast<uint16_t>(sign << 15 | random.below(0x4400));
      std::memcpy(p + 2 * i, &half, 2);
    } else {
      const float f = random.number() / 4.0f;
      uint32_t word;
      std::memcpy(&word, &f, 4);
      if (type == Number::fp32) std::memcpy(p + 4 * i, &word, 4);
      const uint16_t half = static_cast<uint16_t>(word >> 16);
      if (type == Number::bf16) std::memcpy(p + 2 * i, &half, 2);
    }
  }
  return p;
}

const uint8_t* random_bytes(Stored& s, Random& random, size_t count, uint32_t limit) {
  s.memory.emplace_back(count);
  uint8_t* p = s.memory.back().data();
  for (size_t i = 0; i < count; ++i) p[i] = static_cast<uint8_t>(random.below(limit));
  return p;
}

std::string add_codes(Stored& s, Random& random, int bits, Kind kind, size_t group_size) {
  Matrix& m = s.matrix;
  CodeTerm t = {};
  t.bits = bits;
  t.codes = random_bytes(s, random, m.blocks() * m.chunks() * 2 * 64 * static_cast<size_t>(bits), 256);
  const bool row = group_size == 0 || m.in_features % group_size != 0;
  t.group_size = row ? m.chunks() * kChunk : group_size;
  t.groups = row ? 1 : m.in_features / group_size;
  const size_t count = m.blocks() * t.groups * kBlockRows;
  t.scale_type = kScaleTypes[random.below(4)];
  t.scales = random_numbers(s, random, t.scale_type, count);
  const uint32_t codes = 1u << bits;
  if (kind <= Kind::stepped && random.below(2)) t.zero_points = random_bytes(s, random, count, codes);
  t.offset_type = random.below(2) ? Number::fp16 : Number::fp32;
  if (random.below(3) == 0) t.offsets = random_numbers(s, random, t.offset_type, count);
  t.unit = random.below(2) ? 1.0f : 0.0078125f;
  t.map = kind <= Kind::stepped ? Map::linear : kind == Kind::table1 ? Map::table1 : Map::table2;
  t.step = kind == Kind::stepped ? (random.below(2) ? 2 : -3) : 1;
  t.base = random.below(2) ? -static_cast<int32_t>(codes / 2) : 0;
  if (t.zero_points) t.base = 0;
  if (kind >= Kind::table1) {
    if (bits <= 4 && random.below(2)) t.selectors = random_bytes(s, random, count, 4);
    for (size_t i = 0; i < 256; ++i) {
      t.high[i] = static_cast<uint8_t>(1 + random.below(255));                             // -127 .. 127
      t.low[i] = static_cast<uint8_t>(kind == Kind::table2 ? 64 + random.below(128) : 0);  // -64 .. 63
    }
  }
  m.codes.push_back(t);
  return std::string(" int") + std::to_string(bits) + " " + kKindNames[static_cast<int>(kind)] + " g" +
         (row ? "row" : std::to_string(t.group_size)) + " " + kNumberNames[static_cast<int>(t.scale_type)] +
         (t.zero_points ? " zero_points" : "") +
         (t.offsets ? std::string(" offsets ") + kNumberNames[static_cast<int>(t.offset_type)] : "") +
         (t.selectors ? " selectors" : "");
}

// A plane of levels two apart, around zero.
std::string add_plane(Stored& s, Random& random, int bits, size_t group_size) {
  const std::string name = add_codes(s, random, bits, Kind::linear, group_size);
  CodeTerm& t = s.matrix.codes.back();
  t.zero_points = nullptr, t.offsets = nullptr;
  t.step = 2, t.base = 1 - (1 << bits);
  return name + " plane";
}

// Levels below 8 in magnitude with multipliers of 16 or 32 inputs, and scales of up to 256.
std::string add_multiplied(Stored& s, Random& random, int bits, size_t multiplier_size) {
  const std::string name = add_codes(s, random, bits, Kind::linear, 0);
  CodeTerm& t = s.matrix.codes.back();
  t.zero_points = nullptr, t.offsets = nullptr, t.unit = 0.0078125f;
  t.base = -(1 << bits) / 2;
  t.multiplier_size = multiplier_size;
  t.multiplier_groups = s.matrix.in_features / multiplier_size;
  t.multipliers = random_bytes(s, random, s.matrix.blocks() * t.multiplier_groups * kTileRows, 256);
  return name + " m" + std::to_string(multiplier_size);
}

// Five ternary codes to a byte.
std::string add_base3(Stored& s, Random& random, Kind kind, size_t group_size) {
  const std::string name = add_codes(s, random, 2, kind, group_size);
  const Matrix& m = s.matrix;
  CodeTerm& t = s.matrix.codes.back();
  t.base3 = true, t.count = 3, t.selectors = nullptr;
  t.vectors = (m.in_features + 19) / 20;
  t.codes = random_bytes(s, random, m.blocks() * code_block_bytes(t, m.chunks()), 243);
  return name + " base 3";
}

std::string add_floats(Stored& s, Random& random, Number type) {
  Matrix& m = s.matrix;
  m.floats.push_back({type, random_numbers(s, random, type, m.blocks() * m.in_features * kBlockRows), {}});
  return std::string(" ") + kNumberNames[static_cast<int>(type)];
}

// Rows of ordinary numbers, with a row of zeros, a few outliers and some tiny groups.
std::vector<float> random_activations(Random& random, size_t tokens, size_t in_features) {
  std::vector<float> x(tokens * in_features);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t k = 0; k < in_features; ++k) {
      float& value = x[t * in_features + k];
      value = t == 2 ? 0.0f : random.number();
      if (random.below(40) == 0) value *= 256.0f;
      if (t == 3 && k >= 64) value *= 0x1p-60f;
    }
  return x;
}

// sum over k of weight * activation in double, with the magnitude that rounding errors are relative to.
void reference(const Matrix& m, const Activations& a, size_t token, size_t row, double* sum,
               double* magnitude) {
  std::vector<float> weights(a.in_features);
  *sum = 0, *magnitude = 0;
  const auto add_term = [&](const Matrix& term, bool quantized) {
    dequantize_row(term, row, weights.data());
    double peak = 0, total = 0;
    for (size_t k = 0; k < a.in_features; ++k) {
      const size_t at = token * a.padded + k;
      const int integer = a.limbs == 2 ? kLimbBase * a.high[at] + a.low[at] : a.high[at];
      const double x = quantized
                           ? static_cast<double>(integer) * a.scales[token * a.groups + k / kActivationGroup]
                           : a.values[token * a.in_features + k];
      *sum += weights[k] * x;
      peak = std::fmax(peak, std::fabs(weights[k]));
      total += std::fabs(x);
    }
    *magnitude += peak * total;
  };
  Matrix term;
  term.out_features = m.out_features, term.in_features = m.in_features;
  for (const CodeTerm& t : m.codes) {
    term.codes = {t};
    add_term(term, true);
  }
  term.codes.clear();
  for (const FloatTerm& t : m.floats) {
    term.floats = {t};
    add_term(term, false);
  }
}

uint64_t checksum(const std::vector<float>& values) {  // FNV-1a
  uint64_t hash = 0xcbf29ce484222325u;
  const uint8_t* p = reinterpret_cast<const uint8_t*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(float); ++i) hash = (hash ^ p[i]) * 0x100000001b3u;
  return hash;
}

bool run_case(const std::string& name, const Stored& s, Random& random, size_t tokens, int limbs) {
  const Matrix& m = s.matrix;
  const std::vector<float> x = random_activations(random, tokens, m.in_features);
  ActivationBuffer buffer;
  const Activations a = buffer.prepare(tokens, m.in_features, limbs, x.data());
  const size_t stride = m.out_features + 3;  // what lies between rows of the result must stay as it is
  std::vector<float> out(tokens * stride, 7.0f), alone(stride, 7.0f);
  const Product product = {&m, out.data(), stride};
  team()->run([&](const Member& member) {
    size_t first, last;
    member.share(tokens, &first, &last);
    quantize_rows(a, first, last);
    member.barrier();
    MatmulScratch scratch;
    matmul(member, &product, 1, a, scratch);
  });
  std::printf("[%zu, %zu]%s, %zu tokens, %d limbs: %016llx\n", m.out_features, m.in_features, name.c_str(),
              tokens, limbs, static_cast<unsigned long long>(checksum(out)));

  // Terms are accumulated segment by segment in float32, over at most 640 inputs here.
  constexpr double kTolerance = 640 * 0x1p-24;
  for (size_t t = 0; t < tokens; ++t)
    for (size_t row = 0; row < m.out_features; ++row) {
      double sum, magnitude;
      reference(m, a, t, row, &sum, &magnitude);
      const double received = out[t * stride + row];
      if (std::fabs(received - sum) <= kTolerance * magnitude) continue;
      std::printf("wrong: token %zu, row %zu: expected %.9g, received %.9g\n", t, row, sum, received);
      return false;
    }

  // A token's result does not depend on the others.
  if (tokens > 1) {
    const size_t last = tokens - 1;
    ActivationBuffer single;
    const Activations b = single.prepare(1, m.in_features, limbs, x.data() + last * m.in_features);
    const Product one = {&m, alone.data(), stride};
    quantize_rows(b, 0, 1);
    team()->run([&](const Member& member) {
      MatmulScratch scratch;
      matmul(member, &one, 1, b, scratch);
    });
    if (std::memcmp(alone.data(), out.data() + last * stride, stride * sizeof(float)) != 0) {
      std::printf("wrong: the last token alone gives other bits than among %zu\n", tokens);
      return false;
    }
  }
  return true;
}

bool run_all() {
  set_team_size(2);
  Random random;
  bool good = true;
  constexpr size_t kIn[] = {64, 160, 48, 33, 96, 7, 192, 128};
  constexpr size_t kOut[] = {33, 64, 5, 40, 96};
  constexpr size_t kGroups[] = {16, 32, 64, 0};
  constexpr size_t kTokens[] = {1, 2, 4, 9, 17};
  const auto shaped = [&] {
    Stored s;
    s.matrix.in_features = kIn[random.below(8)];
    s.matrix.out_features = kOut[random.below(5)];
    return s;
  };
  // Several tokens take every kernel in turn: decoded once each, decoded for several, unpacked.
  constexpr Crossovers kCrossovers[] = {{kMostFew, 1}, {1, kMostFew}, {1, 1}};
  const auto run = [&](const std::string& name, const Stored& s, int limbs) {
    set_crossovers(kCrossovers[random.below(3)]);
    good = run_case(name, s, random, kTokens[random.below(5)], limbs) && good;
  };
  for (int bits = 1; bits <= 8; ++bits)
    for (Kind kind : {Kind::linear, Kind::stepped, Kind::table1, Kind::table2})
      for (size_t group_size : kGroups)
        for (int limbs = 1; limbs <= 2; ++limbs) {
          Stored s = shaped();
          const std::string name = add_codes(s, random, bits, kind, group_size);
          run(name, s, limbs);
        }
  for (int limbs = 1; limbs <= 2; ++limbs)
    for (size_t size : {16, 32}) {
      for (int bits = 1; bits <= 4; ++bits) {
        Stored s = shaped();
        s.matrix.in_features = size * (1 + random.below(9));
        const std::string name = add_multiplied(s, random, bits, size);
        run(name, s, limbs);
      }
      for (Kind kind : {Kind::linear, Kind::table1, Kind::table2}) {
        Stored s = shaped();
        const std::string name = add_base3(s, random, kind, size == 16 ? 0 : 64);
        run(name, s, limbs);
      }
    }
  // Stacked planes, of one bit in 17 blocks, where AVX-512 looks sums up.
  for (int bits = 1; bits <= 4; ++bits)
    for (size_t group_size : {64, 128}) {
      Stored s;
      s.matrix.in_features = 640;
      s.matrix.out_features = bits == 1 ? 520 : 72;
      std::string name = add_plane(s, random, bits, group_size);
      for (int plane = 1; plane < 3; ++plane) name += " +" + add_plane(s, random, bits, group_size);
      set_crossovers({1, 1});
      good = run_case(name, s, random, 19, 1) && good;
    }
  for (int repeat = 0; repeat < 8; ++repeat)
    for (Number type : {Number::fp32, Number::fp16, Number::bf16}) {
      Stored s = shaped();
      if (repeat == 7) s.matrix.out_features = 300;  // several blocks at once
      std::string name = add_floats(s, random, type);
      if (repeat % 2) name += " +" + add_codes(s, random, 1 + repeat, Kind::table1, 32);
      if (repeat % 4 == 3) name += " +" + add_codes(s, random, repeat, Kind::linear, 64);
      run(name, s, 1 + repeat / 2 % 2);
    }
  return good;
}

}  // namespace
}  // namespace lowbit::selftest

int main(int argc, char** argv) {
  if (const char* error = lowbit::isa_error()) {
    std::fprintf(stderr, "%s\n", error);
    return 2;
  }
  if (argc == 2 && std::strcmp(argv[1], "--isas") == 0) {
    const char* names[lowbit::kIsas];
    const int count = lowbit::supported_isas(names);
    for (int k = 0; k < count; ++k) std::printf("%s\n", names[k]);
    return 0;
  }
  return lowbit::selftest::run_all() ? 0 : 1;
}
