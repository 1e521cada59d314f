// What all processes of a schedule share, and what outlives them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tests/sim/kv_model.h"
#include "tests/sim/sim_rpc.h"
#include "tests/sim/world.h"
#include "transport/fake_transport.h"
#include "transport/throttle.h"

namespace kvrelay::sim {

struct Host {
  World& world;
  Network& network;
  transport::FakeFabric& fabric;
  uint64_t next_address = 1;
  std::shared_ptr<transport::Throttle> throttle = nullptr;  // of all that moves between them
  // Memory of dead processes stays mapped at their readers.
  std::vector<std::shared_ptr<RankMemory>> graveyard;
  std::string violation;  // the first invariant that broke; empty: none

  void Violate(const std::string& what) {
    if (violation.empty()) violation = what;
  }
};

}  // namespace kvrelay::sim
