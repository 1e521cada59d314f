// What protocol logic may touch besides its own state. Everything here is real in a process and
// virtual in tests/sim.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "agent/counters.h"
#include "agent/rpc.h"
#include "base/clock.h"
#include "base/ids.h"

namespace kvrelay::agent {

struct Env {
  Clock& clock;
  Rpc& rpc;
  Counters& counters;
  std::function<uint64_t()> random;    // uniform 64 bits
  std::string owner_role = "prefill";  // in messages: of the engines whose KV is read

  LeaseId RandomLeaseId() const;
};

// One incarnation of an engine as its peers tell it apart.
struct EngineKey {
  EngineId engine;
  Incarnation incarnation = 0;
  auto operator<=>(const EngineKey&) const = default;
};

}  // namespace kvrelay::agent
