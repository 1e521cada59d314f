// How leases end, and when their blocks are free again.
#include <algorithm>
#include <utility>

#include "agent/owner_leader.h"
#include "proto/codec.h"

namespace kvrelay::agent {
namespace {

constexpr size_t kMaxEnded = 4096;

}  // namespace

TimePoint OwnerLeader::NextExpiry(const Lease& lease) const {
  TimePoint next = lease.cap_at;
  if (lease.claims.empty()) next = std::min(next, lease.unclaimed_until);
  for (const auto& [reader, until] : lease.claims) next = std::min(next, until);
  return next;
}

void OwnerLeader::ArmTimer(Lease& lease) {
  env_.clock.Cancel(lease.timer);
  lease.timer = env_.clock.CallAt(NextExpiry(lease), [this, id = lease.id] { OnTimer(id); });
}

void OwnerLeader::OnTimer(const LeaseId& id) {
  Lease* lease = Find(id);
  if (lease == nullptr || lease->state == State::kEnding) return;
  lease->timer = 0;
  const TimePoint now = env_.clock.Now();
  if (now >= lease->cap_at) return EndLease(*lease, "cap");
  if (lease->claims.empty() && now >= lease->unclaimed_until) return EndLease(*lease, "ttl");
  const size_t silent =
      std::erase_if(lease->claims, [now](const auto& claim) { return claim.second <= now; });
  if (silent > 0 && lease->claims.empty()) return EndLease(*lease, "reader_silent");
  ArmTimer(*lease);
}

void OwnerLeader::Withdraw(const LeaseId& id, const std::string& reason) {
  Lease* lease = Find(id);
  if (lease != nullptr && lease->state != State::kEnding) EndLease(*lease, reason);
}

size_t OwnerLeader::WithdrawAll(const std::string& reason) {
  std::vector<LeaseId> ids;
  for (const auto& [id, lease] : leases_) {
    if (lease.state != State::kEnding) ids.push_back(id);
  }
  for (const LeaseId& id : ids) Withdraw(id, reason);
  return ids.size();
}

void OwnerLeader::EndLease(Lease& lease, const std::string& reason) {
  env_.counters.Add("kvrelay_leases_ended_total{reason=\"" + reason + "\"}");
  Remember(lease.id, reason);
  env_.clock.Cancel(lease.timer);
  lease.timer = 0;
  lease.state = State::kEnding;
  lease.claims.clear();
  if (const auto offered = std::exchange(lease.offered, nullptr)) {
    env_.clock.CallAfter({}, [offered, reason] {
      offered(Error(Code::kLeaseEnded, "the lease ended before it started (" + reason + ")"));
    });
  }
  const LeaseId id = lease.id;
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    lease.ranks[rank].done = false;
    EndOnRank(id, rank);
  }
}

// Repeats until the rank acknowledged: its block is ours only then.
void OwnerLeader::EndOnRank(const LeaseId& id, size_t rank) {
  Lease* lease = Find(id);
  if (lease == nullptr) return;
  const proto::End end{.leader = ranks_.leader(), .lease = id};
  lease->ranks[rank].call = std::make_unique<RetryingCall>(
      env_.rpc, env_.clock, "own rank " + std::to_string(rank), ranks_.endpoints()[rank],
      proto::Type::kEnd, proto::Encode(end),
      RetryPolicy{.tries = 5, .per_try = Millis(2000), .pause = Millis(20)},
      env_.clock.Now() + Millis(10'000), [this, id, rank](const Result<std::string>& reply) {
        Lease* ending = Find(id);
        if (ending == nullptr) return;
        if (!reply.has_value()) {
          env_.clock.CallAfter(Millis(200), [this, id, rank] { EndOnRank(id, rank); });
          return;
        }
        ending->ranks[rank].done = true;
        if (std::ranges::all_of(ending->ranks, [](const OnRank& r) { return r.done; })) {
          leases_.erase(id);  // the table's destructor is the blocks' way back to the pool
        }
      });
}

void OwnerLeader::Remember(const LeaseId& id, const std::string& reason) {
  if (!ended_.emplace(id, reason).second) return;
  ended_order_.push_back(id);
  if (ended_order_.size() > kMaxEnded) {
    ended_.erase(ended_order_.front());
    ended_order_.pop_front();
  }
}

std::vector<OwnerLeader::LeaseInfo> OwnerLeader::List() const {
  static constexpr const char* kNames[] = {"starting", "offered", "claimed", "ending"};
  std::vector<LeaseInfo> list;
  for (const auto& [id, lease] : leases_) {
    list.push_back({.lease = id,
                    .state = kNames[static_cast<size_t>(lease.state)],
                    .prefix = lease.offer.prefix,
                    .tokens = lease.offer.tokens,
                    .blocks = static_cast<uint32_t>(lease.offer.blocks.num_blocks()),
                    .readers = static_cast<uint32_t>(lease.claims.size()),
                    .left = std::max(Duration{}, Duration(NextExpiry(lease) - env_.clock.Now()))});
  }
  return list;
}

}  // namespace kvrelay::agent
