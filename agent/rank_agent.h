// The agent of one rank in a real process: its control thread, listener, transports and lease
// records around the state machines of both roles.
#pragma once

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "agent/event_loop.h"
#include "agent/leader_link.h"
#include "agent/owner_rank.h"
#include "agent/peer_table.h"
#include "agent/reader_rank.h"
#include "agent/zmq_rpc.h"
#include "kvcache/device.h"
#include "kvcache/region.h"

namespace kvrelay::agent {

// A rank's cache as it is registered: register_kv_caches of the field. Regions by RegionId, as the
// layout names them; they outlive the agent.
struct RankCache {
  KvLayout layout;
  KvShard shard;
  std::vector<const Region*> regions;
  std::shared_ptr<Device> device = {};  // that allocated them; null: host memory
};

struct RankAgentOptions {
  EngineId engine;
  Incarnation incarnation = 0;
  uint32_t rank = 0;
  ContentHash model;
  std::string model_name;
  std::string listen;  // "tcp://127.0.0.1:0"
  std::string transport = "auto";
  std::string run_dir;               // of this engine, mode 0700
  std::string host_id;               // as in transport::Options
  std::string data_interface;        // empty: loopback
  bool trusted_data_network = true;  // else `auto` opens no ports there that do not ask for keys
  // Who we are and whom we talk to, on calls and in zmq-packed, which `auto` takes only with it.
  // Null: no keys.
  std::shared_ptr<const transport::CurveIdentity> curve;
  Duration spin = std::chrono::microseconds(50);
  uint64_t chunk_bytes = transport::kDefaultChunkBytes;
  uint64_t max_mapped_bytes = 0;                  // as in transport::Options
  std::shared_ptr<transport::Throttle> throttle;  // as in transport::Options
  uint64_t max_asked_bytes = 0;                   // as in ReaderRank
  uint32_t record_slots = 4096;
  std::string owner_role = "prefill";  // as in Env
};

// What `inspect` shows of a rank.
struct RankSnapshot {
  KvLayout layout;
  KvShard shard;
  std::vector<proto::RegionInfo> regions;
  std::vector<OwnerRank::LeaseInfo> leases;
  std::vector<ReaderRank::SessionInfo> sessions;
  std::vector<PeerTable::PeerInfo> peers;
  uint64_t packed_streams = 0;
  // What each transport counts.
  std::vector<std::pair<std::string_view, transport::Counters>> transports;
};

class RankAgent {
 public:
  // Checks the cache against its regions, makes the transports and binds the listener; nothing runs
  // yet. kInvalidArgument for a layout outside its regions or a port taken; kResourceExhausted for
  // no memory. `counters` outlive the agent.
  static Result<std::unique_ptr<RankAgent>> Create(const RankAgentOptions& options,
                                                   const RankCache& cache, Counters& counters);
  // Stops the control thread and the transports, in bounded time.
  ~RankAgent();

  // Starts the control thread.
  void Run();
  // Stops it; afterwards the control thread's objects belong to the caller. Idempotent.
  void Stop();
  // After Stop: lets go of everything that was timed, posted or called and did not run. The
  // leader's objects, which it may hold, can be destroyed then.
  void Clear();

  // Any thread.
  const std::string& endpoint() const { return endpoint_; }
  void Post(std::function<void()> fn) { loop_.Post(std::move(fn)); }
  std::shared_ptr<ProgressWriter> Writer(const LeaseId& lease) const {
    return owner_->Writer(lease);
  }
  const std::vector<std::string>& transport_notes() const { return transport_notes_; }

  // Control thread.
  Env& env() { return *env_; }
  ReaderRank& reader() { return *reader_; }
  RankSnapshot Snapshot() const;

 private:
  RankAgent(const RankAgentOptions& options, Counters& counters);
  Status Open(const RankAgentOptions& options, const RankCache& cache);
  Status OpenTransports(const RankAgentOptions& options, const RankCache& cache);

  EventLoop loop_;
  Counters& counters_;
  std::string endpoint_;
  std::unique_ptr<ZmqRpc> rpc_;
  std::unique_ptr<Region> records_;
  std::vector<std::unique_ptr<transport::Transport>> transports_;
  std::vector<std::string> transport_notes_;  // "mapped", "no ucx-packed: ..."
  std::unique_ptr<Env> env_;
  std::unique_ptr<LeaderLink> link_;
  std::unique_ptr<OwnerRank> owner_;
  std::unique_ptr<PeerTable> peers_;
  std::unique_ptr<ReaderRank> reader_;
  std::thread thread_;
};

}  // namespace kvrelay::agent
