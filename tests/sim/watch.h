// Invariants that no process can see alone: what messages promised, held against what the lease
// records, the blocks and the other side say.
#pragma once

#include <map>
#include <set>
#include <string>
#include <utility>

#include "agent/leader_link.h"
#include "agent/owner_rank.h"
#include "agent/reader_rank.h"
#include "tests/sim/host.h"

namespace kvrelay::sim {

// One rank, in both roles.
//  - Live leases that share a block are of the same content: no block is in two hands.
//  - What a live record's progress covers lies in its blocks, word by word.
//  - Epochs never repeat; no lease outlives the rank's own cap.
//  - Pulls that run have destination blocks of their own.
class RankWatch {
 public:
  struct Started {
    proto::Start start;
    TimePoint at;
  };

  // Looks by itself after each START and PULL.
  RankWatch(Host& host, SimRpc& rpc, RankMemory& memory, const agent::LeaderLink& link,
            const agent::OwnerRank& owner, const agent::ReaderRank& reader);

  void CheckLeases();
  // Null when the lease was never started here.
  const Started* Find(const LeaseId& lease) const;

 private:
  void CheckPulls();
  void Violate(const std::string& what) const;

  Host& host_;
  const std::string name_;
  RankMemory& memory_;
  const agent::LeaderLink& link_;
  const agent::OwnerRank& owner_;
  const agent::ReaderRank& reader_;
  std::map<LeaseId, Started> started_;
  std::map<uint64_t, LeaseId> epochs_;
  std::map<uint64_t, proto::Pull> pulls_;  // by number; of the leader that leads
};

// The front of an owner engine: a claim is granted only for the lease's own content, and never
// again to a reader that released it.
class ClaimWatch {
 public:
  ClaimWatch(Host& host, SimRpc& front, const RankWatch& rank);

 private:
  void OnClaim(const proto::Claim& claim, const proto::ClaimReply& granted);

  Host& host_;
  const RankWatch& rank_;
  std::set<std::pair<LeaseId, agent::EngineKey>> released_;
};

}  // namespace kvrelay::sim
