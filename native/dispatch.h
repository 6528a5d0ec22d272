// Names every instruction set of this build once, so that a dispatch is a declaration and a switch.
//
//   #define LOWBIT_DECLARE(isa) namespace isa { void f(); }
//   LOWBIT_EVERY_ISA(LOWBIT_DECLARE)
//   #define LOWBIT_CASE(isa) case Isa::isa: return isa::f();
//   switch (active_isa()) { LOWBIT_EVERY_ISA(LOWBIT_CASE) default: break; }
#pragma once

#include "isa.h"

#ifdef LOWBIT_HAVE_avx2
#define LOWBIT_IF_AVX2(x) x
#else
#define LOWBIT_IF_AVX2(x)
#endif
#ifdef LOWBIT_HAVE_avxvnni
#define LOWBIT_IF_AVXVNNI(x) x
#else
#define LOWBIT_IF_AVXVNNI(x)
#endif
#ifdef LOWBIT_HAVE_avx512
#define LOWBIT_IF_AVX512(x) x
#else
#define LOWBIT_IF_AVX512(x)
#endif
#ifdef LOWBIT_HAVE_neon
#define LOWBIT_IF_NEON(x) x
#else
#define LOWBIT_IF_NEON(x)
#endif
#ifdef LOWBIT_HAVE_neondot
#define LOWBIT_IF_NEONDOT(x) x
#else
#define LOWBIT_IF_NEONDOT(x)
#endif

#define LOWBIT_EVERY_ISA(X)     \
  X(scalar)                     \
  LOWBIT_IF_AVX2(X(avx2))       \
  LOWBIT_IF_AVXVNNI(X(avxvnni)) \
  LOWBIT_IF_AVX512(X(avx512)) LOWBIT_IF_NEON(X(neon)) LOWBIT_IF_NEONDOT(X(neondot))
