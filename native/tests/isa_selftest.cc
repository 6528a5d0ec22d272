// Holds every operation of simd.h, on each instruction set that this CPU has, against the scalar set.
//
//   isa_selftest                    exit code 0 when all results are equal, 1 otherwise
//   isa_selftest --spoil OPERATION  flips one bit of that operation's results: must exit with 1
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "isa.h"
#include "operations.h"

namespace lowbit::selftest {
namespace {

// xorshift64*: the same cases everywhere.
struct Random {
  uint64_t state = 0x9e3779b97f4a7c15u;
  uint32_t next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<uint32_t>((state * 0x2545f4914f6cdd1du) >> 32);
  }
  uint32_t below(uint32_t n) { return next() % n; }
};

float from_word(uint32_t x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
uint32_t to_word(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  return x;
}

// Zeros, subnormals, limits, infinities, NaNs, ties of rounding to integers and to fp16, edges of int32.
const uint32_t kEdges[] = {
    0x00000000, 0x80000000, 0x00000001, 0x80000001,
    0x007fffff, 0x807fffff, 0x00800000, 0x80800000,  // tiny
    0x7f7fffff, 0xff7fffff, 0x7f800000, 0xff800000,
    0x7fc00000, 0xffc12345, 0x7f812345, 0x7f7ffffe,  // huge
    0x3f800000, 0xbf800000, 0x3f000000, 0xbf000000,
    0x3effffff, 0x3f000001, 0x3fc00000, 0xc0200000,  // near 1
    0x4b000000, 0x4affffff, 0xcb000001, 0x4effffff,
    0xcf000000, 0x34000000, 0x33800000, 0x7e800000,  // integers
    0x477fe000, 0x477fefff, 0x477ff000, 0x38800000,
    0x387fffff, 0x33000000, 0x33000001, 0xb3c00000,  // fp16
};
constexpr uint32_t kEdgeCount = sizeof kEdges / sizeof *kEdges;
const uint8_t kByteEdges[] = {0, 1, 2, 126, 127, 128, 129, 254, 255};
const uint32_t kIntegerEdges[] = {0, 1, 0xffffffff, 0x7fffffff, 0x80000000, 0x01000001, 127, 128, 0xffffff7f};

// The float value of fp16 bits, from the definition of the format.
float fp16_value(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                  : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
  return h & 0x8000 ? -magnitude : magnitude;
}

uint32_t random_float(Random& random, int kind) {
  const uint32_t sign = random.next() & 0x80000000;
  switch (kind) {
    case 0:
      return kEdges[random.below(kEdgeCount)];
    case 1:
      return random.next();
    case 2:  // ordinary magnitudes, 2^-12 .. 2^12
      return sign | ((115 + random.below(24)) << 23) | (random.next() >> 9);
    case 3:  // halves: ties of rounding
      return to_word((static_cast<float>(random.below(4096)) - 2048.0f) * 0.5f);
    default:  // around an fp16 number and around the middle of two
      return (sign | to_word(fp16_value(static_cast<uint16_t>(random.below(0x7c00))))) +
             (random.below(2) ? 0x1000 : 0) + random.below(3) - 1;
  }
}

Case random_case(Random& random, uint32_t number) {
  Case c = {};
  const int kind = static_cast<int>(number % 5);
  for (auto& vector : c.f)
    for (float& lane : vector) lane = from_word(random_float(random, kind));
  for (auto& vector : c.i)
    for (int32_t& lane : vector)
      lane = static_cast<int32_t>(kind == 0 ? kIntegerEdges[random.below(9)] : random.next());
  for (auto& vector : c.u)
    for (uint8_t& byte : vector)
      byte = kind == 0 ? kByteEdges[random.below(9)] : static_cast<uint8_t>(random.next());
  if (kind == 3) {  // extremes on both sides of the dot product
    for (uint8_t& byte : c.u[0]) byte = kByteEdges[random.below(9)];
    for (int32_t& lane : c.i[1]) {
      uint8_t bytes[4];
      for (uint8_t& byte : bytes) byte = kByteEdges[random.below(9)];
      std::memcpy(&lane, bytes, 4);
    }
  }
  for (uint8_t& byte : c.table) byte = static_cast<uint8_t>(random.next());
  for (uint16_t& half : c.h) half = static_cast<uint16_t>(random.next());
  c.n = number % 17;
  return c;
}

// The floats just around fp16 pattern h and around the middle between it and the next.
uint32_t near_fp16(uint16_t h, uint32_t which) {
  const uint32_t here = to_word(fp16_value(h)), next = to_word(fp16_value(static_cast<uint16_t>(h + 1)));
  const uint32_t around[] = {here, here - 1, here + 1, here / 2 + next / 2, here / 2 + next / 2 + 1};
  return around[which];
}

struct Cases {
  std::vector<Case> list;
  size_t general = 0;  // those behind are for conversions of fp16 alone
  size_t count(Domain domain) const { return domain == Domain::fp16 ? list.size() : general; }
};

Cases make_cases() {
  Random random;
  Cases all;
  std::vector<Case>& cases = all.list;
  for (uint32_t number = 0; number < 4000; ++number) cases.push_back(random_case(random, number));
  // Every pair of edges.
  for (uint32_t first = 0; first < kEdgeCount * kEdgeCount; first += 16) {
    Case c = random_case(random, 0);
    for (uint32_t lane = 0; lane < 16; ++lane) {
      c.f[0][lane] = from_word(kEdges[(first + lane) / kEdgeCount % kEdgeCount]);
      c.f[1][lane] = from_word(kEdges[(first + lane) % kEdgeCount]);
    }
    cases.push_back(c);
  }
  // Every product of a u8 and an s8, every index of a table.
  for (uint32_t first = 0; first < 65536; first += 64) {
    Case c = random_case(random, 2);
    uint8_t bytes[64];
    for (uint32_t k = 0; k < 64; ++k) {
      c.u[0][k] = static_cast<uint8_t>(first + k);
      bytes[k] = static_cast<uint8_t>((first + k) >> 8);
    }
    std::memcpy(c.i[1], bytes, 64);
    cases.push_back(c);
  }
  all.general = cases.size();
  // Every fp16 pattern, and the floats that must round to it.
  for (uint32_t which = 0; which < 5; ++which)
    for (uint32_t first = 0; first < 65536; first += 16) {
      Case c = random_case(random, 1);
      for (uint32_t lane = 0; lane < 16; ++lane) {
        c.h[lane] = static_cast<uint16_t>(first + lane);
        c.f[0][lane] = from_word(near_fp16(c.h[lane], which));
      }
      cases.push_back(c);
    }
  return all;
}

// Brings the operands into what the operation's precondition allows.
void restrict_to(Domain domain, Case& c) {
  switch (domain) {
    case Domain::any:
    case Domain::fp16:
      break;
    case Domain::integral:
      for (float& x : c.f[0]) x = std::fabs(x) < 0x1p31f || x == -0x1p31f ? std::nearbyint(x) : 0.0f;
      break;
    case Domain::exponent:
      for (int32_t& x : c.i[0]) x = static_cast<int32_t>(static_cast<uint32_t>(x) % 254) - 126;
      break;
    case Domain::index16:
      for (uint8_t& x : c.u[0]) x &= 15;
      break;
    case Domain::index64:
      for (uint8_t& x : c.u[0]) x &= 63;
      break;
    case Domain::dot_small:
      for (uint8_t& x : c.u[0]) x &= 127;
      [[fallthrough]];
    case Domain::dot_127:
      for (int32_t& x : c.i[1]) {
        int8_t bytes[4];
        std::memcpy(bytes, &x, 4);
        for (int8_t& byte : bytes) byte = byte == -128 ? 127 : byte;
        std::memcpy(&x, bytes, 4);
      }
      [[fallthrough]];
    case Domain::dot:  // the sum stays inside int32
      for (int32_t& x : c.i[0]) x /= 2;
      break;
  }
}

// Memory that ends at a page which may not be read.
class Fence {
 public:
  Fence() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    memory_ = static_cast<uint8_t*>(
        mmap(nullptr, 2 * page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mprotect(memory_ + page_, page_, PROT_NONE) != 0) std::perror("mprotect");
  }
  ~Fence() { munmap(memory_, 2 * page_); }
  Fence(const Fence&) = delete;
  Fence& operator=(const Fence&) = delete;
  // The n floats, ending at the fence.
  const float* place(const float* p, size_t n) {
    uint8_t* start = memory_ + page_ - n * sizeof(float);
    std::memcpy(start, p, n * sizeof(float));
    return reinterpret_cast<const float*>(start);
  }

 private:
  size_t page_;
  uint8_t* memory_;
};

bool is_nan(uint32_t word) { return (word & 0x7fffffff) > 0x7f800000; }

// Index of the first byte that differs, or kResultBytes.
size_t first_difference(Compare compare, const uint8_t* expected, const uint8_t* received) {
  for (size_t at = 0; at < kResultBytes; at += 4) {
    uint32_t x, y;
    std::memcpy(&x, expected + at, 4);
    std::memcpy(&y, received + at, 4);
    if (x == y || (compare == Compare::number && is_nan(x) && is_nan(y))) continue;
    for (size_t byte = at; byte < at + 4; ++byte)
      if (expected[byte] != received[byte]) return byte;
  }
  return kResultBytes;
}

struct alignas(64) Result {
  uint8_t misalign[4];
  uint8_t bytes[kResultBytes];
};

bool equal_to_scalar(const char* isa, const Operation& scalar, const Operation& vector, const Cases& cases,
                     Fence& fence, bool spoil) {
  for (size_t number = 0; number < cases.count(scalar.domain); ++number) {
    Case c = cases.list[number];
    restrict_to(scalar.domain, c);
    c.tail = fence.place(c.f[0], c.n);
    Result expected, received;
    std::memset(&expected, 0xa5, sizeof expected);
    std::memset(&received, 0xa5, sizeof received);
    scalar.run(c, expected.bytes);
    vector.run(c, received.bytes);
    if (spoil) received.bytes[0] ^= 1;
    const size_t at = first_difference(scalar.compare, expected.bytes, received.bytes);
    if (at == kResultBytes) continue;
    std::printf("%s: %s differs from scalar in case %zu, byte %zu: expected %02x, received %02x\n", isa,
                scalar.name, number, at, expected.bytes[at], received.bytes[at]);
    return false;
  }
  return true;
}

// The scalar set is the definition; what it says about numbers with a definition of their own is checked
// here.
bool scalar_is_sound(const Cases& cases) {
  const Operations scalar = scalar::operations();
  bool sound = true;
  for (size_t k = 0; k < scalar.count; ++k) {
    const Operation& operation = scalar.list[k];
    const bool dot = std::strcmp(operation.name, "dot4") == 0;
    const bool load = std::strcmp(operation.name, "load_fp16") == 0;
    const bool store = std::strcmp(operation.name, "store_fp16") == 0;
    if (!dot && !load && !store) continue;
    for (size_t number = 0; number < cases.count(operation.domain); ++number) {
      Case c = cases.list[number];
      restrict_to(operation.domain, c);
      if (store)
        for (int lane = 0; lane < 16; ++lane) c.f[0][lane] = fp16_value(c.h[lane]);
      Result result;
      operation.run(c, result.bytes);
      for (int lane = 0; lane < 16; ++lane) {
        int32_t word, sum = c.i[0][lane];
        std::memcpy(&word, result.bytes + 4 * lane, 4);
        uint16_t half;
        std::memcpy(&half, result.bytes + 2 * lane, 2);
        int8_t a[4];
        std::memcpy(a, &c.i[1][lane], 4);
        for (int j = 0; j < 4; ++j) sum += c.u[0][4 * lane + j] * a[j];
        const float value = fp16_value(c.h[lane]);
        const bool equal = dot    ? word == sum
                           : load ? std::isnan(value) ? is_nan(static_cast<uint32_t>(word))
                                                      : static_cast<uint32_t>(word) == to_word(value)
                           : std::isnan(value) ? (half & 0x7fff) > 0x7c00
                                               : half == c.h[lane];
        sound = sound && equal;
      }
    }
    if (!sound) {
      std::printf("scalar: %s is not what its definition says\n", operation.name);
      return false;
    }
  }
  return true;
}

bool check(const char* isa, Operations vector, const Cases& cases, const char* spoil) {
  const Operations scalar = scalar::operations();
  Fence fence;
  size_t wrong = 0;
  for (size_t k = 0; k < scalar.count; ++k) {
    const bool spoiled = spoil && std::strcmp(spoil, scalar.list[k].name) == 0;
    wrong += !equal_to_scalar(isa, scalar.list[k], vector.list[k], cases, fence, spoiled);
  }
  if (!wrong)
    std::printf("%s: %zu operations equal scalar in %zu to %zu cases\n", isa, scalar.count, cases.general,
                cases.list.size());
  return wrong == 0;
}

Operations operations_of(const char* isa) {
#ifdef LOWBIT_HAVE_avx2
  if (std::strcmp(isa, "avx2") == 0) return avx2::operations();
#endif
#ifdef LOWBIT_HAVE_avxvnni
  if (std::strcmp(isa, "avxvnni") == 0) return avxvnni::operations();
#endif
#ifdef LOWBIT_HAVE_avx512
  if (std::strcmp(isa, "avx512") == 0) return avx512::operations();
#endif
#ifdef LOWBIT_HAVE_neon
  if (std::strcmp(isa, "neon") == 0) return neon::operations();
#endif
#ifdef LOWBIT_HAVE_neondot
  if (std::strcmp(isa, "neondot") == 0) return neondot::operations();
#endif
  return scalar::operations();
}

}  // namespace
}  // namespace lowbit::selftest

int main(int argc, char** argv) {
  using namespace lowbit::selftest;
  const char* spoil = argc == 3 && std::strcmp(argv[1], "--spoil") == 0 ? argv[2] : nullptr;
  if (argc > 1 && !spoil) {
    std::fprintf(stderr, "usage: isa_selftest [--spoil OPERATION]\n");
    return 2;
  }
  const Cases cases = make_cases();
  bool good = scalar_is_sound(cases);
  const char* names[lowbit::kIsas];
  const int count = lowbit::supported_isas(names);
  for (int k = 0; k < count; ++k) good = check(names[k], operations_of(names[k]), cases, spoil) && good;
  return good ? 0 : 1;
}
