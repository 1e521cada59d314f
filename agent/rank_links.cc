#include "agent/rank_links.h"

#include <algorithm>
#include <utility>

#include "proto/codec.h"

namespace kvrelay::agent {

RankLinks::RankLinks(Env& env, Incarnation leader, std::vector<std::string> endpoints)
    : env_(env), leader_(leader), endpoints_(std::move(endpoints)), ranks_(endpoints_.size()) {
  for (size_t rank = 0; rank < ranks_.size(); ++rank) SayHello(rank, 0);
}

bool RankLinks::AllKnown() const {
  return std::ranges::all_of(ranks_, [](const Link& link) { return link.incarnation != 0; });
}

void RankLinks::WhenAllKnown(std::function<void()> fn) {
  if (AllKnown()) return fn();
  waiting_.push_back(std::move(fn));
}

void RankLinks::Renew(size_t rank) {
  ranks_[rank].incarnation = 0;
  SayHello(rank, 0);
}

void RankLinks::SayHello(size_t rank, uint64_t challenge) {
  ranks_[rank].hello = std::make_unique<RetryingCall>(
      env_.rpc, env_.clock, "own rank " + std::to_string(rank), endpoints_[rank],
      proto::Type::kHello, proto::Encode(proto::Hello{.leader = leader_, .challenge = challenge}),
      RetryPolicy{.tries = 5, .per_try = Millis(2000), .pause = Millis(20)},
      env_.clock.Now() + Millis(10'000), [this, rank](const Result<std::string>& reply) {
        const auto hello = reply.has_value()
                               ? proto::Decode<proto::HelloReply>(*reply)
                               : Result<proto::HelloReply>(tl::unexpected(reply.error()));
        if (!hello.has_value()) {
          env_.clock.CallAfter(Millis(200), [this, rank] { SayHello(rank, 0); });
          return;
        }
        if (hello->challenge != 0) return SayHello(rank, hello->challenge);
        ranks_[rank].incarnation = hello->rank_incarnation;
        if (!AllKnown()) return;
        for (const auto& fn : std::exchange(waiting_, {})) fn();
      });
}

}  // namespace kvrelay::agent
