// What a reader engine may ask of a lease: claim it, keep it, let it go.
#include <algorithm>

#include "agent/decode_request.h"
#include "agent/owner_leader.h"
#include "proto/codec.h"

namespace kvrelay::agent {
namespace {

constexpr size_t kMaxReaders = 64;  // of one lease

std::string Short(const LeaseId& id) { return id.ToHex().substr(0, 8); }

}  // namespace

void OwnerLeader::OnClaim(std::string_view body, const ResponderPtr& responder) {
  const auto claim = DecodeRequest<proto::Claim>(env_, body);
  if (!claim.has_value()) return responder->Fail(claim.error());
  const auto reply = MakeClaim(*claim);
  if (!reply.has_value()) {
    env_.counters.Add("kvrelay_claims_total{outcome=\"refused\"}");
    return responder->Fail(reply.error());
  }
  env_.counters.Add("kvrelay_claims_total{outcome=\"ok\"}");
  responder->Reply(proto::Encode(*reply), false);
}

Result<proto::ClaimReply> OwnerLeader::MakeClaim(const proto::Claim& claim) {
  if (claim.owner_incarnation != ranks_.leader()) {
    return Error(Code::kLeaseEnded, "lease " + Short(claim.lease) +
                                        " ended: the prefill worker restarted since its ticket");
  }
  if (claim.model != options_.model) {
    return Error(Code::kIncompatible, "the claim is for model " + claim.model.ToHex() +
                                          ", this prefill worker has " + options_.model.ToHex());
  }
  Lease* lease = Find(claim.lease);
  if (lease == nullptr || lease->state == State::kEnding || lease->state == State::kStarting) {
    const auto why = ended_.find(claim.lease);
    if (lease == nullptr && why == ended_.end()) {
      return Error(Code::kRefused, "no lease " + Short(claim.lease) + " was offered here lately");
    }
    return Error(Code::kLeaseEnded, "lease " + Short(claim.lease) + " ended (" +
                                        (why == ended_.end() ? "ending" : why->second) + ")");
  }
  // A ticket of another request, even of the same size, is refused here, and by w3 should it get
  // further.
  if (claim.hash != lease->offer.hash || claim.tokens != lease->offer.tokens) {
    return Error(Code::kRefused, "lease " + Short(claim.lease) + " is of another prompt (" +
                                     std::to_string(lease->offer.tokens) +
                                     " tokens, the claim says " + std::to_string(claim.tokens) +
                                     ")");
  }
  const EngineKey reader{claim.reader, claim.reader_incarnation};
  if (lease->released.contains(reader)) {
    return Error(Code::kLeaseEnded,
                 "this reader released lease " + Short(claim.lease) + " already");
  }
  if (!lease->claims.contains(reader) && lease->claims.size() >= kMaxReaders) {
    return Error(Code::kOverloaded, "lease " + Short(claim.lease) + " has " +
                                        std::to_string(kMaxReaders) + " readers");
  }
  lease->claims[reader] = env_.clock.Now() + options_.ttl;
  lease->state = State::kClaimed;
  ArmTimer(*lease);

  proto::ClaimReply reply{.tables = lease->offer.blocks.tables(),
                          .first_token = lease->offer.first_token,
                          .tokens = lease->offer.tokens,
                          .ranks = {},
                          .ttl_ms = static_cast<uint32_t>(ToMillis(options_.ttl))};
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    reply.ranks.push_back({.endpoint = ranks_.endpoints()[rank],
                           .rank = static_cast<uint32_t>(rank),
                           .incarnation = ranks_.incarnation(rank),
                           .slot = lease->ranks[rank].slot,
                           .epoch = lease->ranks[rank].epoch,
                           .shard = options_.rank_shards[rank],
                           .scales = lease->offer.scales[rank]});
  }
  return reply;
}

void OwnerLeader::OnHeartbeat(std::string_view body, const ResponderPtr& responder) {
  const auto heartbeat = DecodeRequest<proto::Heartbeat>(env_, body);
  if (!heartbeat.has_value()) return responder->Fail(heartbeat.error());
  const EngineKey reader{heartbeat->reader, heartbeat->reader_incarnation};
  proto::HeartbeatReply reply{.incarnation = ranks_.leader(), .ended = {}};
  for (const LeaseId& id : heartbeat->leases) {
    Lease* lease = Find(id);
    if (lease == nullptr || lease->state == State::kEnding || !lease->claims.contains(reader)) {
      reply.ended.push_back(id);
      continue;
    }
    lease->claims[reader] = env_.clock.Now() + options_.ttl;  // the timer looks again when it fires
  }
  responder->Reply(proto::Encode(reply), false);
}

void OwnerLeader::OnRelease(std::string_view body, const ResponderPtr& responder) {
  const auto release = DecodeRequest<proto::Release>(env_, body);
  if (!release.has_value()) return responder->Fail(release.error());
  for (const LeaseId& id : release->leases) {
    ReleaseClaim({release->reader, release->reader_incarnation}, id);
  }
  responder->Reply(proto::Encode(proto::Empty{}), false);
}

void OwnerLeader::ReleaseClaim(const EngineKey& reader, const LeaseId& id) {
  Lease* lease = Find(id);
  if (lease == nullptr || lease->state == State::kEnding) return;
  if (lease->released.size() >= kMaxReaders && !lease->claims.contains(reader)) return;
  lease->released.insert(reader);
  lease->claims.erase(reader);
  if (lease->claims.empty()) EndLease(*lease, "released");
}

}  // namespace kvrelay::agent
