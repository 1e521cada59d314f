#include "agent/small_pull.h"

#include <chrono>
#include <string>
#include <utility>

namespace kvrelay::agent {

std::optional<SmallPull> SmallPull::Plan(const PeerTable& peers, const RankIdentity& identity,
                                         const proto::Pull& pull) {
  if (pull.tokens.size() * identity.layout.token_bytes() > transport::kSmallRead) {
    return std::nullopt;
  }
  std::vector<KvShard> owners;
  for (const proto::ClaimRank& rank : pull.claim.ranks) owners.push_back(rank.shard);
  const auto sources = AssignSources(identity.shard, owners);
  if (!sources.has_value() || sources->empty()) return std::nullopt;
  SmallPull small;
  TakenScales scales(identity.layout, identity.shard);
  for (const PullSource& source : *sources) {
    const proto::ClaimRank& rank = pull.claim.ranks[source.owner];
    auto peer = peers.Find(rank.endpoint, rank.incarnation);
    if (peer == nullptr) return std::nullopt;
    auto plan = PlanSource(pull, identity, source, *peer, scales);
    if (!plan.has_value()) return std::nullopt;
    small.sources_.push_back({std::move(peer), *std::move(plan)});
  }
  small.scales_ = scales.scales();
  return small;
}

std::optional<proto::PullReply> SmallPull::Run(Counters& counters) const {
  const TimePoint started = std::chrono::steady_clock::now();
  proto::PullReply reply;
  reply.scales = scales_;
  for (const auto& [peer, plan] : sources_) {
    const ReadyPeer::Path& path = peer->paths.front();
    const auto read = path.transport->ReadNow(path.handle, plan.whole, plan.guard);
    if (!read || !read->status.ok() || !GuardHolds(plan.want, read->before, read->after)) {
      return std::nullopt;
    }
    reply.path = path.transport->name();
    reply.bytes += plan.whole.src_bytes();
    reply.cast = reply.cast || plan.whole.casts();
  }
  reply.copy_ms = ToMillis(std::chrono::steady_clock::now() - started);
  counters.Add("kvrelay_pulls_total{path=\"" + reply.path + "\",outcome=\"ok\"}");
  return reply;
}

}  // namespace kvrelay::agent
