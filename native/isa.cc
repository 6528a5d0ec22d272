// Picks the instruction set once, from the CPU and from LOWBIT_ISA.
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace lowbit {
namespace {

bool cpu_has(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
#ifdef LOWBIT_HAVE_avx2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Isa::avxvnni:
#ifdef LOWBIT_HAVE_avxvnni
      return cpu_has(Isa::avx2) && __builtin_cpu_supports("avxvnni");
#else
      return false;
#endif
    case Isa::avx512:
#ifdef LOWBIT_HAVE_avx512
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("gfni");
#else
      return false;
#endif
    case Isa::neon:
#ifdef LOWBIT_HAVE_neon
      return true;
#else
      return false;
#endif
    case Isa::neondot:
#if defined(LOWBIT_HAVE_neondot) && defined(__linux__)
      return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(LOWBIT_HAVE_neondot)
      return true;
#else
      return false;
#endif
  }
  return false;
}

constexpr Isa kAll[kIsas] = {Isa::scalar, Isa::avx2, Isa::avxvnni, Isa::avx512, Isa::neon, Isa::neondot};

struct Choice {
  Isa isa = Isa::scalar;
  std::string error;
};

Choice choose() {
  Choice choice;
  for (Isa isa : kAll)
    if (cpu_has(isa)) choice.isa = isa;
  const char* wanted = std::getenv("LOWBIT_ISA");
  if (!wanted || !*wanted) return choice;
  std::string available;
  for (Isa isa : kAll) {
    if (!cpu_has(isa)) continue;
    if (std::strcmp(wanted, isa_name(isa)) == 0) {
      choice.isa = isa;
      return choice;
    }
    available += available.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
  }
  choice.error = std::string("LOWBIT_ISA=") + wanted + ": this CPU and build support " + available +
                 "; set one of these or unset it";
  return choice;
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

Isa active_isa() { return chosen().isa; }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avxvnni:
      return "avxvnni";
    case Isa::avx512:
      return "avx512";
    case Isa::neon:
      return "neon";
    case Isa::neondot:
      return "neondot";
  }
  return "unknown";
}

int supported_isas(const char* names[kIsas]) {
  int count = 0;
  for (Isa isa : kAll)
    if (cpu_has(isa)) names[count++] = isa_name(isa);
  return count;
}

const char* isa_error() { return chosen().error.empty() ? nullptr : chosen().error.c_str(); }

}  // namespace lowbit
