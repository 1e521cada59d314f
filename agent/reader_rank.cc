#include "agent/reader_rank.h"

#include <utility>

#include "agent/decode_request.h"
#include "proto/codec.h"

namespace kvrelay::agent {
namespace {

constexpr size_t kRememberEnded = 65536;

uint64_t RegisteredBytes(const RankIdentity& identity) {
  uint64_t bytes = 0;
  for (const proto::RegionInfo& region : identity.regions) bytes += region.bytes;
  return bytes;
}

}  // namespace

ReaderRank::ReaderRank(Env& env, LeaderLink& link, PeerTable& peers, RankIdentity identity,
                       uint64_t chunk_bytes, uint64_t max_asked_bytes)
    : env_(env),
      link_(link),
      peers_(peers),
      identity_(std::move(identity)),
      chunk_bytes_(chunk_bytes),
      quarantine_(RegisteredBytes(identity_) / 2),
      window_(max_asked_bytes) {
  link_.OnNewLeader([this] {
    CancelAll();
    ended_.clear();  // the former leader's numbers are refused by its incarnation from now on
    ended_below_ = 0;
  });
  env_.rpc.Handle(proto::Type::kPull, [this](std::string_view body, const ResponderPtr& responder) {
    OnPull(body, responder);
  });
  env_.rpc.Handle(proto::Type::kDrop, [this](std::string_view body, const ResponderPtr& responder) {
    OnDrop(body, responder);
  });
}

bool ReaderRank::Ended(uint64_t number) const {
  return number < ended_below_ || ended_.contains(number);
}

void ReaderRank::MarkEnded(uint64_t number) {
  if (number < ended_below_) return;
  ended_.insert(number);
  while (ended_.size() > kRememberEnded) {
    ended_below_ = *ended_.begin() + 1;
    ended_.erase(ended_.begin());
  }
}

void ReaderRank::OnPull(std::string_view body, const ResponderPtr& responder) {
  auto pull = DecodeRequest<proto::Pull>(env_, body);
  if (!pull.has_value()) return responder->Fail(pull.error());
  if (Status status = link_.Check(pull->leader); !status.ok()) return responder->Fail(status);
  const uint64_t number = pull->number;
  if (Ended(number)) {
    return responder->Fail({Code::kCancelled, "pull " + std::to_string(number) + " is over"});
  }
  if (const auto it = running_.find(number); it != running_.end()) {
    it->second.pulls.push_back(responder);
    return;
  }
  Running& running = running_[number];
  running.pulls.push_back(responder);
  running.session = std::make_shared<PullSession>(
      env_, peers_, identity_, quarantine_, window_, chunk_bytes_, std::move(*pull),
      PullSession::Events{
          .finished = [this, number](const Result<proto::PullReply>& r) { OnFinished(number, r); },
          .drained = [this, number] { OnDrained(number); }});
  running.session->Start();
}

std::optional<DirectPull> ReaderRank::PlanDirect(const proto::Pull& pull) const {
  if (!link_.Check(pull.leader).ok()) return std::nullopt;
  return DirectPull::Plan(peers_, identity_, pull);
}

void ReaderRank::OnFinished(uint64_t number, const Result<proto::PullReply>& result) {
  Running& running = running_.at(number);
  for (const ResponderPtr& responder : std::exchange(running.pulls, {})) {
    if (result.has_value()) {
      responder->Reply(proto::Encode(*result), false);
    } else {
      responder->Fail(result.error());
    }
  }
}

void ReaderRank::OnDrained(uint64_t number) {
  const auto it = running_.find(number);
  const Running running = std::move(it->second);
  running_.erase(it);
  MarkEnded(number);
  for (const ResponderPtr& responder : running.drops) {
    responder->Reply(proto::Encode(proto::Empty{}), false);
  }
}

void ReaderRank::OnDrop(std::string_view body, const ResponderPtr& responder) {
  const auto drop = DecodeRequest<proto::Drop>(env_, body);
  if (!drop.has_value()) return responder->Fail(drop.error());
  if (Status status = link_.Check(drop->leader); !status.ok()) return responder->Fail(status);
  const auto it = running_.find(drop->number);
  if (it == running_.end()) {
    MarkEnded(drop->number);  // a PULL that this DROP overtook must not start any more
    return responder->Reply(proto::Encode(proto::Empty{}), false);
  }
  it->second.drops.push_back(responder);
  it->second.session->Cancel({Code::kCancelled, "the pull was given up"});
}

void ReaderRank::CancelAll() {
  std::vector<std::shared_ptr<PullSession>> sessions;
  for (const auto& [number, running] : running_) sessions.push_back(running.session);
  for (const auto& session : sessions) {
    session->Cancel({Code::kCancelled, "another leader took over this rank"});
  }
}

std::vector<ReaderRank::SessionInfo> ReaderRank::List() const {
  std::vector<SessionInfo> list;
  for (const auto& [number, running] : running_) {
    const proto::Pull& pull = running.session->pull();
    size_t blocks = 0;
    for (const KvTable& table : pull.own_tables) blocks += table.blocks.size();
    list.push_back({.number = number,
                    .peer = pull.peer_front,
                    .state = running.session->state(),
                    .tokens = pull.tokens.size(),
                    .blocks = static_cast<uint32_t>(blocks)});
  }
  return list;
}

}  // namespace kvrelay::agent
