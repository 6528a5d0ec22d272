// Which instruction set runs. Chosen once at start from the CPU; LOWBIT_ISA overrides.
#pragma once

namespace lowbit {

enum class Isa { scalar, avx2, avx512, neon, neondot };

// The instruction set in use. The first call reads LOWBIT_ISA and the CPU.
Isa active_isa();
const char* isa_name(Isa isa);
// Names of the instruction sets that are both compiled in and supported by this CPU, best last.
// Returns the count; `names` must hold 5.
int supported_isas(const char* names[5]);
// Null if the environment asked for something that this CPU or build lacks, with `error` set.
const char* isa_error();

}  // namespace lowbit
