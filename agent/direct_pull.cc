#include "agent/direct_pull.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

namespace kvrelay::agent {
namespace {

// What a device moves in a few microseconds, and how long that is waited for.
constexpr uint64_t kWaitedForBytes = 1 << 20;
constexpr Duration kLongestWait = std::chrono::microseconds(30);

}  // namespace

std::optional<DirectPull> DirectPull::Plan(const PeerTable& peers, const RankIdentity& identity,
                                           const proto::Pull& pull) {
  const bool small = pull.tokens.size() * identity.layout.token_bytes() <= transport::kSmallRead;
  std::vector<KvShard> owners;
  for (const proto::ClaimRank& rank : pull.claim.ranks) owners.push_back(rank.shard);
  const auto sources = AssignSources(identity.shard, owners);
  if (!sources.has_value() || sources->empty()) return std::nullopt;
  DirectPull direct;
  TakenScales scales(identity.layout, identity.shard);
  for (const PullSource& source : *sources) {
    const proto::ClaimRank& rank = pull.claim.ranks[source.owner];
    auto peer = peers.Find(rank.endpoint, rank.incarnation);
    if (peer == nullptr) return std::nullopt;
    if (!small && !peer->paths.front().transport->begins()) return std::nullopt;
    auto plan = PlanSource(pull, identity, source, *peer, scales);
    if (!plan.has_value()) return std::nullopt;
    direct.bytes_ += plan->whole.src_bytes();
    direct.sources_.push_back({std::move(peer), *std::move(plan), nullptr});
  }
  direct.scales_ = scales.scales();
  return direct;
}

// False: nothing was begun.
bool DirectPull::Source::Begin() {
  transport::Transport& transport = *path().transport;
  if (transport.begins()) {
    read = transport.Begin(path().handle, plan.whole, plan.guard, plan.want);
    return read != nullptr;
  }
  const auto now = transport.ReadNow(path().handle, plan.whole, plan.guard);
  return now && Holds(*now);
}

bool DirectPull::Source::Holds(const transport::Completion& completion) const {
  return completion.status.ok() && GuardHolds(plan.want, completion.before, completion.after);
}

DirectPull::State DirectPull::Begin() {
  began_ = std::chrono::steady_clock::now();
  failed_ = !std::ranges::all_of(sources_, &Source::Begin);
  State state = Look();
  while (state == State::kReading && bytes_ <= kWaitedForBytes && age() < kLongestWait) {
    state = Look();
  }
  return state;
}

DirectPull::State DirectPull::Look() {
  bool reading = false;
  for (Source& source : sources_) {
    if (source.read == nullptr) continue;
    if (const auto completion = source.read->Look()) {
      failed_ = failed_ || !source.Holds(*completion);
      source.read.reset();
    } else {
      reading = true;
    }
  }
  if (reading) return State::kReading;
  if (!ended_) ended_ = std::chrono::steady_clock::now();
  return failed_ ? State::kNothing : State::kRead;
}

Duration DirectPull::age() const { return std::chrono::steady_clock::now() - began_; }

proto::PullReply DirectPull::Reply(Counters& counters) const {
  proto::PullReply reply;
  reply.path = sources_.front().path().transport->name();
  reply.bytes = bytes_;
  reply.copy_ms = ToMillis(*ended_ - began_);
  reply.scales = scales_;
  reply.cast = std::ranges::any_of(sources_, [](const Source& s) { return s.plan.whole.casts(); });
  counters.Add("kvrelay_pulls_total{path=\"" + reply.path + "\",outcome=\"ok\"}");
  return reply;
}

}  // namespace kvrelay::agent
