// The connector as an inference engine uses it, under the names of the field: register_kv_caches is
// EngineAgent::Create, then offers and loads start from any thread and never block, and
// get_finished says once per step what is over.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "agent/engine_agent.h"

namespace kvrelay::agent {

// Any thread. `agent` outlives it, and its threads have stopped before it is destroyed.
class KvConnector {
 public:
  using LoadId = uint64_t;

  explicit KvConnector(EngineAgent& agent) : agent_(agent) {}

  // Owner: `blocks` hold a prompt's KV, complete and visible on every rank (EngineAgent::Writer
  // publishes progress meanwhile). The ticket, or why there is none, comes with one of the next
  // GetFinished calls under the id.
  LoadId Offer(OfferRequest request);
  // Reader: pulls what the ticket names into `blocks`, which the load holds until nothing writes
  // them any more.
  LoadId StartLoadKv(LoadRequest request);
  // The load ends with kCancelled unless it is over. Unknown ids are ignored.
  void Cancel(LoadId id);

  struct Finished {
    std::vector<std::pair<LoadId, Result<proto::Ticket>>> offers;
    std::vector<std::pair<LoadId, Result<LoadResult>>> loads;
    // Loads whose blocks nobody writes any more; never before the load's result.
    std::vector<LoadId> drained;
  };
  // Everything that ended since the last call.
  Finished GetFinished();

 private:
  LoadId NewId();

  EngineAgent& agent_;
  std::mutex mutex_;
  LoadId next_ = 1;                              // guarded by mutex_
  Finished finished_;                            // guarded by mutex_
  std::map<LoadId, std::weak_ptr<Load>> loads_;  // the leader's control thread
};

}  // namespace kvrelay::agent
