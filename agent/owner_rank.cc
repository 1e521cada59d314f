#include "agent/owner_rank.h"

#include <algorithm>
#include <cstring>

#include "agent/decode_request.h"
#include "agent/table_hash.h"
#include "kvcache/owned_side.h"
#include "proto/codec.h"

namespace kvrelay::agent {
namespace {

constexpr size_t kMaxTombstones = 65536;

HashKey RandomKey(const Env& env) {
  HashKey key;
  const uint64_t words[2] = {env.random(), env.random()};
  static_assert(sizeof(words) == sizeof(key));
  std::memcpy(key.data(), words, sizeof(words));
  return key;
}

}  // namespace

OwnerRank::OwnerRank(Env& env, LeaderLink& link, RankIdentity identity, RecordMemory memory,
                     std::vector<transport::Transport*> transports, uint64_t first_epoch)
    : env_(env),
      link_(link),
      identity_(std::move(identity)),
      memory_(memory),
      transports_(std::move(transports)),
      table_key_(RandomKey(env)),
      next_epoch_(first_epoch) {
  for (uint32_t slot = 0; slot < memory_.slots; ++slot) memory_.records[slot].End();
  for (uint32_t slot = memory_.slots; slot > 0; --slot) free_slots_.push_back(slot - 1);
  link_.OnNewLeader([this] { EndAll(); });
  const auto handle = [this](proto::Type type, auto method) {
    env_.rpc.Handle(type, [this, method](std::string_view body, const ResponderPtr& responder) {
      (this->*method)(body, responder);
    });
  };
  handle(proto::Type::kGetMeta, &OwnerRank::OnGetMeta);
  handle(proto::Type::kStart, &OwnerRank::OnStart);
  handle(proto::Type::kEnd, &OwnerRank::OnEnd);
  handle(proto::Type::kPackedRead, &OwnerRank::OnPackedRead);
  handle(proto::Type::kPackedCancel, &OwnerRank::OnPackedCancel);
}

OwnerRank::~OwnerRank() { EndAll(); }

void OwnerRank::OnGetMeta(std::string_view body, const ResponderPtr& responder) {
  const auto request = DecodeRequest<proto::GetMeta>(env_, body);
  if (!request.has_value()) return responder->Fail(request.error());
  // The reader decides on compatibility, with both sides' values in its message; it may always
  // look.
  proto::Meta meta{.engine = identity_.engine,
                   .incarnation = identity_.incarnation,
                   .rank = identity_.rank,
                   .model = identity_.model,
                   .model_name = identity_.model_name,
                   .layout = identity_.layout,
                   .shard = identity_.shard,
                   .regions = identity_.regions,
                   .record_region = memory_.region,
                   .record_slots = memory_.slots,
                   .table_hash_key = std::string(table_key_.begin(), table_key_.end()),
                   .addresses = {}};
  for (const transport::Transport* transport : transports_) {
    meta.addresses.push_back({std::string(transport->name()), transport->LocalAddress()});
  }
  env_.counters.Add("kvrelay_handshakes_total{outcome=\"served\"}");
  responder->Reply(proto::Encode(meta), false);
}

void OwnerRank::OnStart(std::string_view body, const ResponderPtr& responder) {
  const auto start = DecodeRequest<proto::Start>(env_, body);
  if (!start.has_value()) return responder->Fail(start.error());
  const auto reply = StartLease(*start);
  if (!reply.has_value()) return responder->Fail(reply.error());
  responder->Reply(proto::Encode(*reply), false);
}

Result<proto::StartReply> OwnerRank::StartLease(const proto::Start& start) {
  // First: a rank that came back has no leader yet, and this answer is how ours hears of it.
  if (start.rank_incarnation != identity_.incarnation) {
    return Error(Code::kLeaseEnded, "START is for a former process of this rank");
  }
  KVRELAY_RETURN_IF_ERROR(link_.Check(start.leader));
  if (tombstones_.contains(start.lease)) {
    return Error(Code::kLeaseEnded, "START of a lease that ended here");
  }
  if (const auto it = held_.find(start.lease); it != held_.end()) {
    return proto::StartReply{.slot = it->second.slot, .epoch = it->second.epoch};
  }
  if (start.tokens == 0) return Error(Code::kInvalidArgument, "START: a lease on no tokens");
  const OwnedSide side(identity_.layout, identity_.shard, start.tables);
  KVRELAY_RETURN_IF_ERROR(
      CheckTables("START", side.view(), {start.first_token, start.first_token + start.tokens}));
  KVRELAY_ASSIGN_OR_RETURN(const uint32_t slot, TakeSlot());
  Held held{.slot = slot,
            .epoch = next_epoch_++,
            .tables = start.tables,
            .first_token = start.first_token,
            .tokens = start.tokens,
            .table_hash = TableHash(table_key_, start.tables, start.prompt_hash, start.first_token,
                                    start.tokens)};
  LeaseRecord& record = memory_.records[slot];
  record.Start(held.epoch, identity_.incarnation, held.table_hash);
  {
    const std::lock_guard lock(writers_mutex_);
    writers_[start.lease] = std::make_shared<ProgressWriter>(&record);
  }
  held.cap = env_.clock.CallAfter(Millis(start.cap_ms), [this, lease = start.lease] {
    env_.counters.Add("kvrelay_leases_ended_total{reason=\"rank_cap\"}");
    EndLease(lease);
  });
  const proto::StartReply reply{.slot = slot, .epoch = held.epoch};
  held_.emplace(start.lease, std::move(held));
  return reply;
}

Result<uint32_t> OwnerRank::TakeSlot() {
  std::erase_if(retired_, [this](const auto& retired) {
    if (!retired.second.expired()) return false;
    free_slots_.push_back(retired.first);
    return true;
  });
  if (free_slots_.empty()) {
    return Error(Code::kOverloaded,
                 "all " + std::to_string(memory_.slots) + " lease records of this rank are in use");
  }
  const uint32_t slot = free_slots_.back();
  free_slots_.pop_back();
  return slot;
}

void OwnerRank::OnEnd(std::string_view body, const ResponderPtr& responder) {
  const auto end = DecodeRequest<proto::End>(env_, body);
  if (!end.has_value()) return responder->Fail(end.error());
  EndLease(end->lease);  // by name only: END of an old lease can not end a newer one
  responder->Reply(proto::Encode(proto::Empty{}), false);
}

void OwnerRank::EndLease(const LeaseId& lease) {
  if (tombstones_.insert(lease).second) {
    tombstone_order_.push_back(lease);
    if (tombstone_order_.size() > kMaxTombstones) {
      tombstones_.erase(tombstone_order_.front());
      tombstone_order_.pop_front();
    }
  }
  const auto it = held_.find(lease);
  if (it == held_.end()) return;
  memory_.records[it->second.slot].End();  // dead and fenced before anybody hears that it ended
  env_.clock.Cancel(it->second.cap);
  {
    const std::lock_guard lock(writers_mutex_);
    const auto writer = writers_.find(lease);
    retired_.emplace_back(it->second.slot, writer->second);
    writers_.erase(writer);
  }
  held_.erase(it);
  for (const auto& [key, stream] : streams_) {
    if (stream.lease == lease) stream.transport->Cancel(stream.op);
  }
}

void OwnerRank::EndAll() {
  std::vector<LeaseId> leases;
  leases.reserve(held_.size());
  for (const auto& [lease, held] : held_) leases.push_back(lease);
  for (const LeaseId& lease : leases) EndLease(lease);
}

std::shared_ptr<ProgressWriter> OwnerRank::Writer(const LeaseId& lease) const {
  const std::lock_guard lock(writers_mutex_);
  const auto it = writers_.find(lease);
  return it == writers_.end() ? nullptr : it->second;
}

std::vector<OwnerRank::LeaseInfo> OwnerRank::List() const {
  std::vector<LeaseInfo> list;
  for (const auto& [lease, held] : held_) {
    const uint64_t w1 = memory_.records[held.slot].w[1].load(std::memory_order_relaxed);
    list.push_back({lease, held.slot, held.epoch, held.tokens, Progress::Unpack(w1)});
  }
  return list;
}

}  // namespace kvrelay::agent
