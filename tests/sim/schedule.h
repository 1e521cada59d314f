// One seeded run of a small cluster: requests, tickets that two engines use, faults, crashes and
// restarts, all drawn from the seed; then calm, and the invariants: bytes served are the bytes of
// that lease; no block is in two hands, at the owner or the reader (see watch.h); every request
// ends by its deadline; nothing leaks; and when the faults are over, requests are served again.
#pragma once

#include <cstdint>
#include <string>

#include "tests/sim/sim_decode.h"

namespace kvrelay::sim {

struct ScheduleOptions {
  uint64_t seed = 0;
  bool faults = true;   // off: every request that has room is served, at once
  bool cancels = true;  // users leave; without faults nobody else may notice
};

// `outcomes.violation` names what broke, with the state of every engine.
Outcomes RunSchedule(const ScheduleOptions& options);

}  // namespace kvrelay::sim
