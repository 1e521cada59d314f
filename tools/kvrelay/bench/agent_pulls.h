// Loads of one block of 4 KiB through agents, owner and reader in two processes.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "base/clock.h"
#include "base/status.h"
#include "tools/kvrelay/bench/channel.h"
#include "transport/curve.h"

namespace kvrelay::tools {

struct AgentPulls {
  uint32_t loads = 1;  // of each kind that is measured one after the other
  uint32_t silences = 0;
  Duration silence{};  // before each of those

  // Of the owner that is read again and again; the first load from it is not counted.
  uint32_t leases() const { return 1 + 2 * loads + silences; }
};

// The owners' process: an agent that is read again and again, then some without keys and some with
// `curve`, until the reader goes away. Both processes have the same `curve`.
Status OfferToAgents(Channel& reader, const std::string& folder, const AgentPulls& pulls,
                     std::shared_ptr<const transport::CurveIdentity> curve);

// The reader's: hot and cold loads, and from the first word to an owner that is met for the first
// time to its bytes.
Result<nlohmann::ordered_json> MeasureAgents(Channel& owners, const std::string& folder,
                                             const AgentPulls& pulls,
                                             std::shared_ptr<const transport::CurveIdentity> curve);

}  // namespace kvrelay::tools
