// From blocks to a lease whose records are live on every rank.
#include <algorithm>
#include <utility>

#include "agent/owner_leader.h"
#include "kvcache/request_scales.h"
#include "proto/codec.h"

namespace kvrelay::agent {
namespace {

constexpr RetryPolicy kRankPolicy{.tries = 5, .per_try = Millis(2000), .pause = Millis(20)};
constexpr Duration kRankDeadline = Millis(10'000);

std::string RankName(size_t rank) { return "own rank " + std::to_string(rank); }

}  // namespace

OwnerLeader::OwnerLeader(Env& env, RankLinks& ranks, OwnerOptions options)
    : env_(env), ranks_(ranks), options_(std::move(options)) {
  const auto handle = [this](proto::Type type, auto method) {
    env_.rpc.Handle(type, [this, method](std::string_view body, const ResponderPtr& responder) {
      (this->*method)(body, responder);
    });
  };
  handle(proto::Type::kClaim, &OwnerLeader::OnClaim);
  handle(proto::Type::kHeartbeat, &OwnerLeader::OnHeartbeat);
  handle(proto::Type::kRelease, &OwnerLeader::OnRelease);
}

OwnerLeader::~OwnerLeader() {
  for (auto& [id, lease] : leases_) env_.clock.Cancel(lease.timer);
}

OwnerLeader::Lease* OwnerLeader::Find(const LeaseId& id) {
  const auto it = leases_.find(id);
  return it == leases_.end() ? nullptr : &it->second;
}

// A rank that came back has none of our leases: their readers must not wait for it, and its blocks
// are free of them.
void OwnerLeader::OnRankRestarted(size_t rank) {
  std::vector<LeaseId> ids;
  for (const auto& [id, lease] : leases_) {
    if (lease.state != State::kEnding) ids.push_back(id);
  }
  for (const LeaseId& id : ids) {
    if (Lease* lease = Find(id); lease != nullptr) EndLease(*lease, "rank_restarted");
  }
  ranks_.Renew(rank);
}

Status OwnerLeader::CheckOffer(const OfferRequest& request) const {
  if (leases_.size() >= options_.max_leases) {
    return {Code::kOverloaded, std::to_string(leases_.size()) + " leases are live"};
  }
  if (request.scales.size() != options_.rank_layouts.size()) {
    return {Code::kInvalidArgument, "scales of " + std::to_string(request.scales.size()) +
                                        " ranks, there are " +
                                        std::to_string(options_.rank_layouts.size())};
  }
  for (size_t rank = 0; rank < request.scales.size(); ++rank) {
    const Status status = CheckRequestScales(options_.rank_layouts[rank], request.scales[rank]);
    if (!status.ok()) return status.Wrap(RankName(rank));
  }
  return Status::Ok();
}

void OwnerLeader::Offer(OfferRequest request, std::function<void(Result<LeaseId>)> offered) {
  if (request.scales.empty()) request.scales.resize(ranks_.size());
  if (const Status refusal = CheckOffer(request); !refusal.ok()) {
    env_.clock.CallAfter({}, [offered = std::move(offered), refusal] { offered(Error(refusal)); });
    return;
  }
  const LeaseId id = env_.RandomLeaseId();
  Lease& lease = leases_[id];
  lease.id = id;
  lease.offer = std::move(request);
  lease.offered = std::move(offered);
  lease.ranks.resize(ranks_.size());
  lease.cap_at = env_.clock.Now() + options_.cap;
  lease.unclaimed_until = lease.offer.finished ? env_.clock.Now() + options_.ttl : lease.cap_at;
  ArmTimer(lease);
  ranks_.WhenAllKnown([this, id] {
    Lease* waiting = Find(id);
    if (waiting == nullptr || waiting->state != State::kStarting) return;
    for (size_t rank = 0; rank < ranks_.size(); ++rank) StartOnRank(*waiting, rank);
  });
}

void OwnerLeader::StartOnRank(Lease& lease, size_t rank) {
  const OfferRequest& offer = lease.offer;
  // The rank's own cap is for a leader that never returns: later than ours, so that ours is the one
  // that counts.
  const auto cap_ms = static_cast<uint32_t>(ToMillis(options_.cap * 2));
  const proto::Start start{.leader = ranks_.leader(),
                           .rank_incarnation = ranks_.incarnation(rank),
                           .lease = lease.id,
                           .tables = offer.blocks.tables(),
                           .first_token = offer.first_token,
                           .tokens = offer.tokens,
                           .prompt_hash = offer.hash,
                           .cap_ms = cap_ms};
  lease.ranks[rank].call = std::make_unique<RetryingCall>(
      env_.rpc, env_.clock, RankName(rank), ranks_.endpoints()[rank], proto::Type::kStart,
      proto::Encode(start), kRankPolicy, env_.clock.Now() + kRankDeadline,
      [this, id = lease.id, rank](const Result<std::string>& reply) {
        OnStarted(id, rank, reply);
      });
}

void OwnerLeader::OnStarted(const LeaseId& id, size_t rank, const Result<std::string>& reply) {
  Lease* lease = Find(id);
  if (lease == nullptr || lease->state != State::kStarting) return;
  const auto started = reply.has_value() ? proto::Decode<proto::StartReply>(*reply)
                                         : Result<proto::StartReply>(tl::unexpected(reply.error()));
  if (!started.has_value()) {
    const Status status = started.error();
    const auto offered = std::exchange(lease->offered, nullptr);
    EndLease(*lease, "start_failed");
    offered(Error(status.Wrap("the lease could not start")));
    if (status.code() == Code::kLeaseEnded) OnRankRestarted(rank);
    return;
  }
  lease->ranks[rank].slot = started->slot;
  lease->ranks[rank].epoch = started->epoch;
  lease->ranks[rank].done = true;
  if (!std::ranges::all_of(lease->ranks, [](const OnRank& r) { return r.done; })) return;
  lease->state = State::kOffered;
  const auto offered = std::exchange(lease->offered, nullptr);
  offered(id);
}

void OwnerLeader::MarkFinished(const LeaseId& id) {
  Lease* lease = Find(id);
  if (lease == nullptr || lease->state == State::kEnding || lease->offer.finished) return;
  lease->offer.finished = true;
  lease->unclaimed_until = env_.clock.Now() + options_.ttl;
  ArmTimer(*lease);
}

}  // namespace kvrelay::agent
