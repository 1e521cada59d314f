// The owner engine's promises: offers blocks under a lease, answers claims, and gives the blocks
// back exactly when nobody can count on them any more. One per engine, on its leader's control
// thread.
//
// Life of a lease: kStarting (START sent to every rank) -> kOffered (all records live; the ticket
// leaves) -> kClaimed -> kEnding (END sent, repeated until every rank acknowledged) -> gone. Its
// blocks return to the pool only at "gone".
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "agent/call.h"
#include "agent/env.h"
#include "agent/rank_links.h"
#include "kvcache/held_tables.h"

namespace kvrelay::agent {

struct OwnerOptions {
  ContentHash model;
  std::vector<KvShard> rank_shards;    // by rank
  std::vector<KvLayout> rank_layouts;  // by rank
  Duration ttl = Millis(30'000);   // without a claim since the KV was finished; without a heartbeat
  Duration cap = Millis(600'000);  // of any lease since its offer
  uint32_t max_leases = 4096;
};

struct OfferRequest {
  HeldTables blocks;  // hold tokens [first_token, first_token + tokens), and maybe more
  uint32_t first_token = 0;
  uint32_t tokens = 0;
  ContentHash hash;
  bool prefix = false;    // for `inspect`
  bool finished = false;  // the KV is there already (a cached prefix)
  // By rank, where the caches' scales come with the request; else empty.
  std::vector<KvScales> scales;
};

class OwnerLeader {
 public:
  OwnerLeader(Env& env, RankLinks& ranks, OwnerOptions options);
  ~OwnerLeader();

  // Starts the lease on every rank, then `offered` with its id; or the reason, and nothing is held.
  // Never inside the call.
  void Offer(OfferRequest request, std::function<void(Result<LeaseId>)> offered);
  // The KV is complete and published on all ranks: from now on an unclaimed lease lives for its
  // TTL.
  void MarkFinished(const LeaseId& id);
  // The engine withdraws a lease: prefill failed or was cancelled. Unknown ids are ignored.
  void Withdraw(const LeaseId& id, const std::string& reason);
  // How many there were.
  size_t WithdrawAll(const std::string& reason);

  struct LeaseInfo {
    LeaseId lease;
    std::string state;
    bool prefix = false;
    uint32_t tokens = 0;
    uint32_t blocks = 0;
    uint32_t readers = 0;
    Duration left{};
  };
  std::vector<LeaseInfo> List() const;
  size_t live_leases() const { return leases_.size(); }  // kEnding ones included

 private:
  Status CheckOffer(const OfferRequest& request) const;
  enum class State : uint8_t { kStarting, kOffered, kClaimed, kEnding };
  struct OnRank {
    std::unique_ptr<RetryingCall> call;  // START, later END
    bool done = false;                   // of the call in question
    uint32_t slot = 0;
    uint64_t epoch = 0;
  };
  struct Lease {
    LeaseId id;
    State state = State::kStarting;
    OfferRequest offer;
    std::function<void(Result<LeaseId>)> offered;
    std::vector<OnRank> ranks;
    std::map<EngineKey, TimePoint> claims;  // each with its expiry
    std::set<EngineKey> released;           // tombstones: these readers are done with it
    TimePoint unclaimed_until;
    TimePoint cap_at;
    Clock::TimerId timer = 0;
  };
  // offer.cc
  void OnRankRestarted(size_t rank);
  void StartOnRank(Lease& lease, size_t rank);
  void OnStarted(const LeaseId& id, size_t rank, const Result<std::string>& reply);
  // claim.cc
  void OnClaim(std::string_view body, const ResponderPtr& responder);
  Result<proto::ClaimReply> MakeClaim(const proto::Claim& claim);
  void OnHeartbeat(std::string_view body, const ResponderPtr& responder);
  void OnRelease(std::string_view body, const ResponderPtr& responder);
  void ReleaseClaim(const EngineKey& reader, const LeaseId& id);
  // expire.cc
  void ArmTimer(Lease& lease);
  void OnTimer(const LeaseId& id);
  TimePoint NextExpiry(const Lease& lease) const;
  void EndLease(Lease& lease, const std::string& reason);
  void EndOnRank(const LeaseId& id, size_t rank);
  void Remember(const LeaseId& id, const std::string& reason);

  Lease* Find(const LeaseId& id);

  Env& env_;
  RankLinks& ranks_;
  const OwnerOptions options_;
  std::unordered_map<LeaseId, Lease> leases_;
  // Why leases ended lately, for the message to a reader that comes late. Oldest out.
  std::unordered_map<LeaseId, std::string> ended_;
  std::deque<LeaseId> ended_order_;
};

}  // namespace kvrelay::agent
