// One seeded run of a small cluster: requests, faults, crashes and restarts, all drawn from the
// seed; then calm, and the invariants: bytes served are the bytes of that lease; no block is in two
// hands; every request ends by its deadline; nothing leaks.
#pragma once

#include <cstdint>
#include <string>

#include "tests/sim/sim_decode.h"

namespace kvrelay::sim {

struct ScheduleOptions {
  uint64_t seed = 0;
  bool faults = true;  // off: everything must be served
};

// `outcomes.violation` names what broke, with the state of every engine.
Outcomes RunSchedule(const ScheduleOptions& options);

}  // namespace kvrelay::sim
