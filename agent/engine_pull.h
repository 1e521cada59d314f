// One lease's tokens into this engine: claim, then a PULL to each of our ranks, then the release.
// All ranks or none.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "agent/call.h"
#include "agent/claims.h"
#include "agent/env.h"
#include "agent/rank_links.h"
#include "agent/reader_rank.h"
#include "kvcache/held_tables.h"

namespace kvrelay::agent {

// What all of a leader's pulls share.
struct ReaderContext {
  Env& env;
  Claims& claims;
  RankLinks& ranks;
  ContentHash model;
  // Where the engine has one rank, which is on this thread: that one's. Else null.
  ReaderRank* only_rank = nullptr;
  uint64_t next_pull_number = 1;
  uint64_t quarantined_blocks =
      0;  // destinations of failed pulls that ranks have not given back yet
  // Loads and fetches under way, which are theirs alone to keep: callbacks and callers refer to
  // them weakly, so that with the context everything goes, whatever was in the middle.
  std::set<std::shared_ptr<void>> under_way{};
};

struct PullStats {
  std::string path;         // "mapped", "ucx-packed"; ranks that differ are joined by '+'
  uint64_t bytes = 0;       // over all ranks
  double handshake_ms = 0;  // slowest rank
  double pull_ms = 0;       // slowest rank
  bool cast = false;        // on some rank
  // By rank: what came with the request; none where a rank's own hold.
  std::vector<KvScales> scales;
};

struct EnginePullRequest {
  OwnerKey owner;
  EngineId owner_engine;
  proto::TicketPart part;
  HeldTables blocks;  // ours; held until drained. Empty: SetDestination comes before SetReady
  uint32_t held_tokens = 0;  // the KV of the positions before is here: only the others' is pulled
  Priority priority = Priority::kDecode;
  TimePoint deadline;
};

// Control thread of the leader. Whoever makes it keeps it until drained.
class EnginePull : public std::enable_shared_from_this<EnginePull> {
 public:
  struct Events {
    std::function<void(Result<PullStats>)>
        finished;                   // exactly once, never inside Start, SetReady or Cancel
    std::function<void()> drained;  // exactly once, not before `finished`
  };

  EnginePull(ReaderContext& context, EnginePullRequest request, Events events);

  // Claims at once.
  void Start();
  // Once, for a pull that was made without.
  void SetDestination(HeldTables blocks, uint32_t held_tokens);
  // The owner's KV is complete, or will be while it is read: bytes may move.
  void SetReady();
  void Cancel(const Status& why);

 private:
  struct OnRank {
    Rpc::CallId pull = 0;
    std::unique_ptr<RetryingCall> drop;
    bool asked = false;    // PULL was sent
    bool done = false;     // PULL answered ok
    bool dropped = false;  // DROP acknowledged, or never asked
  };

  void OnClaimed(const Result<std::string>& reply);
  Status CheckClaim(const proto::ClaimReply& claim) const;
  void AskRanks();
  void PlanDirect();
  proto::Pull MakePull() const;
  void StartMoving();
  void LookLater();
  void LookAtDirect();
  void SendPulls();
  void OnPulled(size_t rank, const Result<proto::PullReply>& pulled);
  void Succeed();
  void Fail(const Status& status);
  void SendDrop(size_t rank);
  void DrainIfDropped();
  std::string Who() const { return context_.env.owner_role + " " + request_.owner.front; }

  ReaderContext& context_;
  EnginePullRequest request_;
  Events events_;
  const uint64_t number_;
  std::unique_ptr<RetryingCall> claim_call_;
  Clock::TimerId timer_ = 0;
  proto::ClaimReply claim_;
  std::optional<DirectPull> direct_;
  bool reading_ = false;  // it is at it: the blocks are its own
  bool claimed_ = false;
  bool ready_ = false;
  bool finished_ = false;
  std::vector<OnRank> ranks_;
  PullStats stats_;
};

}  // namespace kvrelay::agent
