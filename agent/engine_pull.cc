#include "agent/engine_pull.h"

#include <algorithm>
#include <utility>

#include "proto/codec.h"

namespace kvrelay::agent {
namespace {

constexpr RetryPolicy kClaimPolicy{.tries = 3, .per_try = Millis(1500), .pause = Millis(20)};
constexpr RetryPolicy kDropPolicy{.tries = 5, .per_try = Millis(2000), .pause = Millis(20)};
constexpr size_t kMaxRanks = 256;
// What a device moves is looked at again and again for so long, then after pauses.
constexpr Duration kLookedAtAlways = Millis(10);
constexpr Duration kLookPause = std::chrono::microseconds(100);

}  // namespace

EnginePull::EnginePull(ReaderContext& context, EnginePullRequest request, Events events)
    : context_(context),
      request_(std::move(request)),
      events_(std::move(events)),
      number_(context.next_pull_number++),
      ranks_(context.ranks.size()) {
  stats_.scales.resize(ranks_.size());
}

void EnginePull::Start() {
  Env& env = context_.env;
  timer_ = env.clock.CallAt(request_.deadline, [weak = weak_from_this()] {
    if (const auto self = weak.lock()) {
      self->Cancel({Code::kDeadlineExceeded,
                    self->Who() + ": the KV cache did not arrive within the deadline"});
    }
  });
  const EngineKey& reader = context_.claims.reader();
  const proto::Claim claim{.reader = reader.engine,
                           .reader_incarnation = reader.incarnation,
                           .owner_incarnation = request_.owner.incarnation,
                           .lease = request_.part.lease,
                           .hash = request_.part.hash,
                           .tokens = request_.part.tokens,
                           .model = context_.model};
  claim_call_ = std::make_unique<RetryingCall>(
      env.rpc, env.clock, Who(), request_.owner.front, proto::Type::kClaim, proto::Encode(claim),
      kClaimPolicy, request_.deadline, [weak = weak_from_this()](const Result<std::string>& reply) {
        if (const auto self = weak.lock()) self->OnClaimed(reply);
      });
}

Status EnginePull::CheckClaim(const proto::ClaimReply& claim) const {
  const proto::TicketPart& part = request_.part;
  if (claim.first_token != part.first_token || claim.tokens != part.tokens) {
    return {Code::kIncompatible,
            Who() + " answered the claim with tokens [" + std::to_string(claim.first_token) +
                ", +" + std::to_string(claim.tokens) + "); the ticket says [" +
                std::to_string(part.first_token) + ", +" + std::to_string(part.tokens) + ")"};
  }
  if (claim.ranks.empty() || claim.ranks.size() > kMaxRanks) {
    return {Code::kIncompatible,
            Who() + " answered the claim with " + std::to_string(claim.ranks.size()) + " ranks"};
  }
  return Status::Ok();
}

void EnginePull::OnClaimed(const Result<std::string>& reply) {
  if (finished_) return;
  claim_call_.reset();
  if (!reply.has_value()) return Fail(reply.error());
  auto claim = proto::Decode<proto::ClaimReply>(*reply);
  if (!claim.has_value()) return Fail(claim.error().Wrap(Who()));
  if (Status status = CheckClaim(*claim); !status.ok()) return Fail(status);
  claim_ = std::move(*claim);
  claimed_ = true;
  context_.claims.Hold(request_.owner, request_.part.lease,
                       std::max(Millis(30), Duration(Millis(claim_.ttl_ms))),
                       [weak = weak_from_this()](const Status& why) {
                         if (const auto self = weak.lock()) self->Cancel(why);
                       });
  PlanDirect();
  if (ready_) AskRanks();
}

void EnginePull::SetDestination(HeldTables blocks, uint32_t held_tokens) {
  if (finished_) return;
  request_.blocks = std::move(blocks);
  request_.held_tokens = held_tokens;
  direct_.reset();  // of other blocks
}

void EnginePull::SetReady() {
  if (std::exchange(ready_, true) || finished_ || !claimed_) return;
  AskRanks();
}

void EnginePull::AskRanks() {
  context_.ranks.WhenAllKnown([weak = weak_from_this()] {
    const auto self = weak.lock();
    if (self && !self->finished_) self->StartMoving();
  });
}

void EnginePull::PlanDirect() {
  if (context_.only_rank != nullptr) direct_ = context_.only_rank->PlanDirect(MakePull());
}

proto::Pull EnginePull::MakePull() const {
  const proto::TicketPart& part = request_.part;
  const TimePoint now = context_.env.clock.Now();
  return {
      .leader = context_.ranks.leader(),
      .number = number_,
      .peer_front = request_.owner.front,
      .owner = request_.owner_engine,
      .lease = part.lease,
      .hash = part.hash,
      .claim = claim_,
      .tokens = {std::max(part.first_token, request_.held_tokens), part.first_token + part.tokens},
      .own_tables = request_.blocks.tables(),
      .priority = request_.priority,
      .timeout_ms = static_cast<uint32_t>(std::max<double>(1, ToMillis(request_.deadline - now)))};
}

void EnginePull::StartMoving() {
  if (!direct_) PlanDirect();  // its peer, or its destination, may have come after the claim
  if (!direct_) return SendPulls();
  const DirectPull::State state = direct_->Begin();
  if (state == DirectPull::State::kNothing) return SendPulls();
  // Perhaps it is here: its caller hears of it from the loop all the same.
  reading_ = true;
  LookLater();
}

// At every round of the loop, which stays awake for it, unless the device has much else to do.
void EnginePull::LookLater() {
  const Duration pause = direct_->age() < kLookedAtAlways ? Duration() : kLookPause;
  context_.env.clock.CallAfter(pause, [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->LookAtDirect();
  });
}

void EnginePull::LookAtDirect() {
  const DirectPull::State state = direct_->Look();
  if (state == DirectPull::State::kReading) return LookLater();
  reading_ = false;
  if (finished_) return DrainIfDropped();
  if (state == DirectPull::State::kNothing) return SendPulls();
  OnPulled(0, direct_->Reply(context_.env.counters));
}

void EnginePull::SendPulls() {
  Env& env = context_.env;
  const std::string body = proto::Encode(MakePull());
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    ranks_[rank].asked = true;
    ranks_[rank].pull = env.rpc.Call(
        context_.ranks.endpoints()[rank], proto::Type::kPull, body, request_.deadline + Millis(100),
        [weak = weak_from_this(), rank](const Result<std::string>& reply, bool) {
          const auto self = weak.lock();
          if (!self) return;
          self->ranks_[rank].pull = 0;
          self->OnPulled(rank, reply.has_value()
                                   ? proto::Decode<proto::PullReply>(*reply)
                                   : Result<proto::PullReply>(tl::unexpected(reply.error())));
        });
  }
}

void EnginePull::OnPulled(size_t rank, const Result<proto::PullReply>& pulled) {
  if (finished_) return;
  if (!pulled.has_value()) return Fail(pulled.error());
  ranks_[rank].done = true;
  stats_.bytes += pulled->bytes;
  stats_.scales[rank] = pulled->scales;
  stats_.handshake_ms = std::max(stats_.handshake_ms, pulled->handshake_ms);
  stats_.pull_ms = std::max(stats_.pull_ms, pulled->copy_ms);
  stats_.cast = stats_.cast || pulled->cast;
  if (stats_.path.find(pulled->path) == std::string::npos) {
    stats_.path += (stats_.path.empty() ? "" : "+") + pulled->path;
  }
  if (std::ranges::all_of(ranks_, [](const OnRank& r) { return r.done; })) Succeed();
}

void EnginePull::Succeed() {
  const auto keep = shared_from_this();
  finished_ = true;
  events_.finished(stats_);
  context_.env.clock.Cancel(timer_);
  context_.claims.Release(request_.owner, request_.part.lease);
  request_.blocks.Reset();
  events_.drained();
}

void EnginePull::Cancel(const Status& why) {
  if (finished_) return;
  finished_ = true;  // nothing counts from here on, but our caller hears of it from the loop
  context_.env.clock.CallAfter({}, [weak = weak_from_this(), why] {
    if (const auto self = weak.lock()) {
      self->finished_ = false;
      self->Fail(why);
    }
  });
}

void EnginePull::Fail(const Status& status) {
  const auto keep = shared_from_this();
  finished_ = true;
  context_.env.clock.Cancel(timer_);
  claim_call_.reset();
  // Also without an answer to the claim: it may have been made.
  context_.claims.Release(request_.owner, request_.part.lease);
  context_.quarantined_blocks += request_.blocks.num_blocks();
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    if (ranks_[rank].pull != 0) context_.env.rpc.Abandon(std::exchange(ranks_[rank].pull, 0));
    if (ranks_[rank].asked) {
      SendDrop(rank);
    } else {
      ranks_[rank].dropped = true;
    }
  }
  events_.finished(Error(status));
  DrainIfDropped();
}

// Until it is acknowledged: the blocks are not ours before.
void EnginePull::SendDrop(size_t rank) {
  Env& env = context_.env;
  ranks_[rank].drop = std::make_unique<RetryingCall>(
      env.rpc, env.clock, "own rank " + std::to_string(rank), context_.ranks.endpoints()[rank],
      proto::Type::kDrop,
      proto::Encode(proto::Drop{.leader = context_.ranks.leader(), .number = number_}), kDropPolicy,
      env.clock.Now() + Millis(10'000),
      [weak = weak_from_this(), rank](const Result<std::string>& reply) {
        const auto self = weak.lock();
        if (!self) return;
        if (!reply.has_value()) {
          self->context_.env.clock.CallAfter(Millis(200), [weak, rank] {
            if (const auto self = weak.lock()) self->SendDrop(rank);
          });
          return;
        }
        self->ranks_[rank].dropped = true;
        self->DrainIfDropped();
      });
}

void EnginePull::DrainIfDropped() {
  if (reading_ || !std::ranges::all_of(ranks_, [](const OnRank& r) { return r.dropped; })) return;
  context_.quarantined_blocks -= request_.blocks.num_blocks();
  request_.blocks.Reset();
  events_.drained();
}

}  // namespace kvrelay::agent
