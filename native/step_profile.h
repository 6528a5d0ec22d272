// Where the time of steps goes, by kind of work, as the first member of the team sees it. A phase ends with
// its barrier, so that waiting for the others counts to the work that is waited for. Off, it costs a branch
// per phase.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace lowbit {

enum class Phase : uint8_t {
  embed,
  norms,
  qkv,
  attention,
  output,
  gate_up,
  activation,
  down,
  experts,
  head,
  choose
};
constexpr std::array<const char*, 11> kPhaseNames = {"embed",   "norms",   "qkv",        "attention",
                                                     "output",  "gate_up", "activation", "down",
                                                     "experts", "head",    "choose"};

struct StepProfile {
  bool on = false;
  uint64_t steps = 0;
  double seconds = 0;  // of whole steps: planning and the start of the team are in no phase
  std::array<double, kPhaseNames.size()> phases{};
};

// Stops the time from phase to phase.
class PhaseClock {
 public:
  explicit PhaseClock(StepProfile* profile) : profile_(profile) {
    if (profile_) last_ = std::chrono::steady_clock::now();
  }
  void end(Phase phase) {
    if (!profile_) return;
    const auto now = std::chrono::steady_clock::now();
    profile_->phases[static_cast<size_t>(phase)] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  StepProfile* profile_;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace lowbit
