// The connector as an inference engine uses it, under the names of the field: register_kv_caches is
// EngineAgent::Create, then offers and loads start from any thread and never block, and
// get_finished says once per step what is over.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "agent/engine_agent.h"
#include "agent/host_xfer_buffer.h"

namespace kvrelay::agent {

// Where the network cannot reach the device's memory, the agent has the caches of a HostXferBuffer:
// SaveKvToHost (HostXferBuffer's) comes before progress is published, and what was received is on
// the device when get_finished names it.
//
// Any thread. `agent` outlives it, and its threads have stopped before it is destroyed.
class KvConnector {
 public:
  using LoadId = uint64_t;

  // `host`: whose caches the agent was created with; null where the network reaches the engine's
  // own. Outlives the connector.
  explicit KvConnector(EngineAgent& agent, const HostXferBuffer* host = nullptr)
      : agent_(agent), host_(host) {}

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
  // Everything that ended since the last call. With a host buffer it copies to the device before it
  // returns, one call at a time; a load whose copy fails is one that failed.
  Finished GetFinished();

 private:
  LoadId NewId();
  // sync_recved_kv_to_device for a load that was received.
  Status SyncToDevice(const HeldTables& own, const PrefixRef& prefix);

  EngineAgent& agent_;
  const HostXferBuffer* const host_;
  std::mutex device_mutex_;
  // Prefixes whose KV was copied to the device. Guarded by device_mutex_.
  std::set<std::weak_ptr<const SystemPrefix>, std::owner_less<>> on_device_;
  std::mutex mutex_;
  std::map<LoadId, HeldTables> received_;  // with a host buffer: a load's own; guarded by mutex_
  LoadId next_ = 1;                        // guarded by mutex_
  Finished finished_;                      // guarded by mutex_
  std::map<LoadId, std::weak_ptr<Load>> loads_;  // the leader's control thread
};

}  // namespace kvrelay::agent
