#include "tests/sim/watch.h"

#include <algorithm>
#include <map>

#include "proto/codec.h"

namespace kvrelay::sim {

RankWatch::RankWatch(Host& host, SimRpc& rpc, RankMemory& memory, const agent::LeaderLink& link,
                     const agent::OwnerRank& owner, const agent::ReaderRank& reader)
    : host_(host),
      name_(rpc.endpoint()),
      memory_(memory),
      link_(link),
      owner_(owner),
      reader_(reader) {
  rpc.Watch(proto::Type::kStart,
            [this](std::string_view request, const Result<std::string>* reply) {
              if (reply == nullptr || !reply->has_value()) return;
              const auto start = proto::Decode<proto::Start>(request);
              started_.try_emplace(start->lease, Started{*start, host_.world.Now()});
              CheckLeases();
            });
  rpc.Watch(proto::Type::kPull, [this](std::string_view request, const Result<std::string>* reply) {
    if (reply != nullptr) return;
    const auto pull = proto::Decode<proto::Pull>(request);
    if (pull->leader != link_.leader()) return;  // it was refused
    pulls_.insert_or_assign(pull->number, *pull);
    CheckPulls();
  });
}

const RankWatch::Started* RankWatch::Find(const LeaseId& lease) const {
  const auto it = started_.find(lease);
  return it == started_.end() ? nullptr : &it->second;
}

void RankWatch::Violate(const std::string& what) const { host_.Violate(name_ + ": " + what); }

void RankWatch::CheckLeases() {
  std::map<BlockId, const proto::Start*> holders;
  for (const agent::OwnerRank::LeaseInfo& live : owner_.List()) {
    const Started* started = Find(live.lease);
    if (started == nullptr) return Violate("a lease lives that nobody started");
    const proto::Start& start = started->start;
    for (const BlockId block : start.tables.front().blocks) {
      const auto [it, first] = holders.emplace(block, &start);
      if (!first && it->second->prompt_hash != start.prompt_hash) {
        return Violate("block " + std::to_string(block) + " is in two live leases' hands");
      }
    }
    const uint32_t end = std::min(live.progress.tokens, start.first_token + start.tokens);
    if (end > start.first_token &&
        !CheckPart(memory_, start.tables.front().blocks, start.tables.front().first_token,
                   start.prompt_hash, start.first_token, end - start.first_token)) {
      return Violate("a live record promises tokens that are not in its blocks");
    }
    const auto [epoch, unused] = epochs_.emplace(live.epoch, live.lease);
    if (epoch->second != live.lease) return Violate("an epoch came again");
    if (host_.world.Now() > started->at + Millis(start.cap_ms)) {
      return Violate("a lease outlived the rank's cap");
    }
  }
}

void RankWatch::CheckPulls() {
  std::map<BlockId, uint64_t> writers;
  for (const agent::ReaderRank::SessionInfo& session : reader_.List()) {
    for (const BlockId block : pulls_.at(session.number).own_tables.front().blocks) {
      if (!writers.emplace(block, session.number).second) {
        return Violate("block " + std::to_string(block) + " is the destination of two pulls");
      }
    }
  }
}

ClaimWatch::ClaimWatch(Host& host, SimRpc& front, const RankWatch& rank)
    : host_(host), rank_(rank) {
  front.Watch(proto::Type::kRelease,
              [this](std::string_view request, const Result<std::string>* reply) {
                if (reply == nullptr || !reply->has_value()) return;
                const auto release = proto::Decode<proto::Release>(request);
                for (const LeaseId& lease : release->leases) {
                  released_.insert({lease, {release->reader, release->reader_incarnation}});
                }
              });
  front.Watch(
      proto::Type::kClaim, [this](std::string_view request, const Result<std::string>* reply) {
        if (reply == nullptr || !reply->has_value()) return;
        OnClaim(*proto::Decode<proto::Claim>(request), *proto::Decode<proto::ClaimReply>(**reply));
      });
}

void ClaimWatch::OnClaim(const proto::Claim& claim, const proto::ClaimReply& granted) {
  const RankWatch::Started* started = rank_.Find(claim.lease);
  if (started == nullptr) return host_.Violate("a claim was granted before its lease started");
  const proto::Start& start = started->start;
  if (claim.hash != start.prompt_hash || claim.tokens != start.tokens ||
      granted.tables != start.tables) {
    host_.Violate("a claim was granted for another content than the lease's");
  }
  if (released_.contains({claim.lease, {claim.reader, claim.reader_incarnation}})) {
    host_.Violate("a claim was granted to a reader that had released the lease");
  }
}

}  // namespace kvrelay::sim
