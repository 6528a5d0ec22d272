// Which instruction set runs. Chosen once at start from the CPU; LOWBIT_ISA overrides.
#pragma once

namespace lowbit {

enum class Isa { scalar, avx2, avxvnni, avx512, neon, neondot };
constexpr int kIsas = 6;

// The instruction set in use. The first call reads LOWBIT_ISA and the CPU.
Isa active_isa();
const char* isa_name(Isa isa);
// Names of the instruction sets that are both compiled in and supported by this CPU, best last.
// Returns the count.
int supported_isas(const char* names[kIsas]);
// Null if the environment asked for something that this CPU or build lacks, with `error` set.
const char* isa_error();

}  // namespace lowbit
