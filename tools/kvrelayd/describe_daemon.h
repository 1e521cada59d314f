// A daemon's own description, out of what its engine and its agents know.
#pragma once

#include <string>
#include <vector>

#include "agent/engine_agent.h"
#include "base/clock.h"
#include "engine/engine.h"
#include "tools/common/describe.h"
#include "tools/common/flags.h"

namespace kvrelay::tools {

// What does not change while it runs.
struct DaemonFacts {
  std::string role;
  std::vector<EffectiveFlag> flags;
  TimePoint started;
};

// What changes besides the engine's and the agents' state.
struct DaemonState {
  bool ready = false;
  bool draining = false;
};

// Any thread; `snapshot` from EngineAgent::Describe.
Description DescribeDaemon(const DaemonFacts& facts, const DaemonState& state,
                           engine::Engine& engine, agent::EngineAgent& agent,
                           const agent::EngineSnapshot& snapshot);

// "model" of "/models/model/": the folder's last part.
std::string ModelName(const std::string& model_dir);

}  // namespace kvrelay::tools
