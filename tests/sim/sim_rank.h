// One rank's agent in a schedule: the same state machines as in a real process, on virtual time and
// a fake fabric.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "agent/leader_link.h"
#include "agent/owner_rank.h"
#include "agent/peer_table.h"
#include "agent/reader_rank.h"
#include "tests/sim/host.h"
#include "tests/sim/watch.h"

namespace kvrelay::sim {

// The n-th engine's, n in [1, 255].
inline EngineId MakeEngineId(uint64_t n) {
  EngineId id;
  id.bytes[0] = static_cast<uint8_t>(n);
  return id;
}

struct SimRankOptions {
  EngineId engine;
  Incarnation incarnation = 0;  // of this process
  uint32_t rank = 0;
  uint32_t tp = 1;
  KvFormat format = KvFormat::kNhd;
  std::string engine_prefix;     // "p0:"; the endpoint is engine_prefix + rank
  bool mapped = true;            // both paths, the one-sided first; else packed only
  uint64_t max_asked_bytes = 0;  // as agent::ReaderRank's
};

class SimRank {
 public:
  SimRank(Host& host, const SimRankOptions& options);
  // The process dies.
  ~SimRank();

  Process& process() { return process_; }
  agent::Env& env() { return *env_; }
  agent::OwnerRank& owner() { return *owner_; }
  RankMemory& memory() { return *memory_; }
  RankWatch& watch() { return *watch_; }
  SimRpc& rpc() { return rpc_; }
  const agent::Counters& counters() const { return counters_; }
  const std::string& endpoint() const { return rpc_.endpoint(); }
  size_t operations() const;
  size_t sessions() const { return reader_->List().size(); }
  // Nothing that it started happens any more; its objects are still there.
  void Freeze();

 private:
  Host& host_;
  Process process_;
  SimRpc rpc_;
  agent::Counters counters_;
  std::shared_ptr<RankMemory> memory_;
  std::vector<std::unique_ptr<transport::FakeTransport>> transports_;
  std::unique_ptr<agent::Env> env_;
  std::unique_ptr<agent::LeaderLink> link_;
  std::unique_ptr<agent::OwnerRank> owner_;
  std::unique_ptr<agent::PeerTable> peers_;
  std::unique_ptr<agent::ReaderRank> reader_;
  std::unique_ptr<RankWatch> watch_;
};

}  // namespace kvrelay::sim
