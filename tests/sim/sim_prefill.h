// A prefill engine in a schedule: the real owner leader and ranks, with a stand-in for the model
// that writes words.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "agent/owner_leader.h"
#include "agent/rank_links.h"
#include "kvcache/block_pool.h"
#include "tests/sim/sim_rank.h"

namespace kvrelay::sim {

class SimPrefill {
 public:
  struct Options {
    EngineId engine;
    std::string prefix;  // of its endpoints: "p0:"
    uint32_t tp = 1;
    KvFormat format = KvFormat::kNhd;
    bool mapped = true;
    uint32_t blocks = kBlocks;
    Duration ttl = Millis(3000);
    Duration cap = Millis(20'000);
    // A ticket left, and later: its KV is complete.
    std::function<void(const Prompt&, const proto::Ticket&)> on_ticket;
    std::function<void(const proto::Ticket&)> on_finished;
  };
  // `rank1`: it outlived the former leader; null: all ranks start anew.
  SimPrefill(Host& host, Options options, std::unique_ptr<SimRank> rank1);
  // The whole process dies.
  ~SimPrefill();

  // Rank 1 alone dies and comes back, with its memory lost.
  void RestartRank1();
  // Before everything else dies. Null when there is none.
  std::unique_ptr<SimRank> TakeRank1();

  // Looks at every rank: leases that the leader let go of are over there, and none outlives the
  // cap.
  void Check();

  const std::string& endpoint() const { return ranks_.front()->endpoint(); }
  // At rest only cached prefixes hold blocks, and no lease lives.
  bool AtRest() const;
  // How many leases ended for one reason.
  uint64_t Ended(const std::string& reason) const;
  std::string State() const;

 private:
  struct Prefix {
    ContentHash hash;
    uint32_t tokens = 0;
    BlockTable blocks;
    bool complete = false;
    std::vector<LeaseId> leases;  // to tell when it is
  };
  struct Job {
    Prompt prompt;
    agent::ResponderPtr responder;
    std::shared_ptr<Prefix> prefix;
    BlockTable blocks;
    LeaseId prefix_lease;
    LeaseId lease;
    int offers_left = 0;
    bool failed = false;
    proto::Ticket ticket;
    uint32_t done = 0;  // of the part in work
  };

  void OnPrefill(std::string_view body, const agent::ResponderPtr& responder);
  Result<BlockTable> Take(uint32_t tokens);
  void OnOffered(const std::shared_ptr<Job>& job, bool prefix, const Result<LeaseId>& lease);
  void Work();
  void WorkPrefix(const std::shared_ptr<Job>& job);
  void WorkOwn(const std::shared_ptr<Job>& job);
  void WriteChunk(const std::shared_ptr<Job>& job, bool prefix, uint32_t count,
                  std::function<void(bool)> done);
  void WriteOnRank(const Job& job, bool prefix, uint32_t count, size_t rank);
  void Finish(const std::shared_ptr<Job>& job);
  void Abort(const std::shared_ptr<Job>& job, const Status& why);
  std::vector<std::shared_ptr<agent::ProgressWriter>> Writers(const Job& job, bool prefix,
                                                              size_t rank) const;
  bool Lives(const LeaseId& lease) const;
  std::unique_ptr<SimRank> NewRank(uint32_t rank);

  Host& host_;
  const Options options_;
  std::shared_ptr<BlockPool> pool_ = BlockPool::Create(options_.blocks);
  std::vector<std::unique_ptr<SimRank>> ranks_;
  std::unique_ptr<agent::RankLinks> links_;
  std::unique_ptr<agent::OwnerLeader> owner_;
  std::unique_ptr<ClaimWatch> claim_watch_;
  std::map<ContentHash, std::shared_ptr<Prefix>> prefixes_;
  std::deque<std::shared_ptr<Job>> jobs_;
  std::shared_ptr<Job> working_;
  uint64_t rank1_lives_ = 0;
};

}  // namespace kvrelay::sim
