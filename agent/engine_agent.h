// All agents of one engine in one process: one per rank, and on rank 0's control thread the leader,
// whose listener is the engine's front. This is what an inference engine embeds.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "agent/claims.h"
#include "agent/fetch.h"
#include "agent/load.h"
#include "agent/owner_leader.h"
#include "agent/prefill_pool.h"
#include "agent/prefix_table.h"
#include "agent/rank_agent.h"
#include "agent/rank_links.h"
#include "kvcache/block_pool.h"
#include "kvcache/prefix_store.h"

namespace kvrelay::agent {

struct EngineAgentOptions {
  EngineId engine;  // zero: random
  ContentHash model;
  std::string model_name;
  uint32_t block_size = 0;
  std::string listen = "tcp://127.0.0.1:0";
  std::string advertise;  // what others dial; needed when `listen` is a wildcard
  int rank_ports = 0;     // rank r > 0 listens on rank_ports + r - 1; 0: any port
  std::string transport = "auto";
  std::string run_dir;
  std::string host_id;  // as in transport::Options
  std::string data_interface;
  bool trusted_data_network = true;                       // as in RankAgentOptions
  std::shared_ptr<const transport::CurveIdentity> curve;  // as in RankAgentOptions
  Duration spin = std::chrono::microseconds(50);
  uint64_t chunk_bytes = transport::kDefaultChunkBytes;
  uint64_t max_mapped_bytes = 0;  // of each rank, as in transport::Options
  // Of all ranks together, see transport/throttle.h. Each rank asks for streams of its share of
  // inflight_bytes at a time (packed_window.h).
  transport::Caps caps;
  uint32_t record_slots = 4096;
  Duration lease_ttl = Millis(30'000);
  Duration lease_cap = Millis(600'000);
  std::string owner_role = "prefill";  // as in Env
  std::vector<std::string> prefill;    // endpoints that a decode engine may ask
  FetchOptions fetch;
  // Gives some of the pool's blocks back that only a cache of the engine's holds; false when there
  // are none. Asked when blocks run short, on the leader's control thread. May be null.
  std::function<bool()> make_room;
};

struct EngineSnapshot {
  std::vector<RankSnapshot> ranks;
  std::vector<std::string> transports;  // of rank 0, and why one is missing
  std::vector<OwnerLeader::LeaseInfo> leases;
  std::vector<PrefillPool::Info> prefills;
  uint64_t claims_held = 0;
  uint64_t releases_unacknowledged = 0;
  uint64_t prefix_waiters = 0;
  uint64_t quarantined_blocks = 0;
  std::optional<transport::Throttle::Counts> throttle;  // where there are caps
};

class EngineAgent {
 public:
  // Binds all listeners; nothing runs yet, so that handlers can be added. `caches` by rank: their
  // regions, `pool` and `prefixes` outlive the agent. Errors as RankAgent::Create.
  static Result<std::unique_ptr<EngineAgent>> Create(EngineAgentOptions options,
                                                     const std::vector<RankCache>& caches,
                                                     std::shared_ptr<BlockPool> pool,
                                                     SystemPrefixStore& prefixes);
  ~EngineAgent();

  // Starts all threads. Handlers of `rpc` were set before.
  void Run();
  // Ends what is left and joins all threads, in bounded time. Idempotent; part of the destructor.
  void Shutdown();

  // Any thread.
  const std::string& endpoint() const { return endpoint_; }  // of the front, as others dial it
  EngineId engine() const { return options_.engine; }
  const ContentHash& model() const { return options_.model; }
  Incarnation incarnation() const { return incarnation_; }
  Counters& counters() { return counters_; }
  void Post(std::function<void()> fn) { ranks_.front()->Post(std::move(fn)); }
  // One rank's progress writer of a live lease, or null.
  std::shared_ptr<ProgressWriter> Writer(uint32_t rank, const LeaseId& lease) const {
    return ranks_[rank]->Writer(lease);
  }
  uint32_t num_ranks() const { return static_cast<uint32_t>(ranks_.size()); }
  // Collects from all control threads; `done` runs on the leader's.
  void Describe(std::function<void(EngineSnapshot)> done);

  // The leader's control thread (before Run: the caller's).
  Env& env() { return ranks_.front()->env(); }
  Rpc& rpc() { return env().rpc; }
  OwnerLeader& owner() { return *owner_; }
  PrefillPool& prefills() { return *prefills_; }
  // What they return goes when it is over, or with the agent: to be held weakly.
  std::shared_ptr<Load> StartLoad(LoadRequest request, Load::Events events);
  std::shared_ptr<Fetch> StartFetch(FetchRequest request,
                                    std::function<void(Result<FetchResult>)> finished);
  // Peers hear of it with their next probe, and send no more requests.
  void SetDraining() { draining_ = true; }

 private:
  EngineAgent(EngineAgentOptions options, std::shared_ptr<BlockPool> pool);
  Status Open(const std::vector<RankCache>& caches, SystemPrefixStore& prefixes);
  std::string ListenOf(uint32_t rank) const;
  std::string AdvertisedAs(uint32_t rank, const std::string& bound) const;
  void Probe(const std::string& endpoint, Duration pause);

  EngineAgentOptions options_;
  const Incarnation incarnation_;
  const std::shared_ptr<BlockPool> pool_;
  Counters counters_;
  std::shared_ptr<transport::Throttle> throttle_;  // null without caps
  std::string endpoint_;
  std::string model_text_;  // as in PingReply
  bool draining_ = false;
  std::vector<std::unique_ptr<RankAgent>> ranks_;
  // The leader's parts, all on rank 0's control thread.
  std::unique_ptr<RankLinks> links_;
  std::unique_ptr<OwnerLeader> owner_;
  std::unique_ptr<Claims> claims_;
  std::unique_ptr<ReaderContext> reader_;
  std::unique_ptr<PrefixTable> prefix_table_;
  std::unique_ptr<PrefillPool> prefills_;
};

}  // namespace kvrelay::agent
