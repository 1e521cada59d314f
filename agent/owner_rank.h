// The owner's side of one rank: its lease records, its metadata, and the packed reads that it
// serves.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "agent/env.h"
#include "agent/leader_link.h"
#include "base/hash.h"
#include "kvcache/lease_record.h"
#include "transport/transport.h"

namespace kvrelay::agent {

// What a rank is and holds; fixed for the life of its process.
struct RankIdentity {
  EngineId engine;
  Incarnation incarnation = 0;
  uint32_t rank = 0;
  ContentHash model;
  std::string model_name;
  KvLayout layout;
  KvShard shard;
  std::vector<proto::RegionInfo> regions;
};

// The record memory of a rank: `slots` records at the start of one registered region.
struct RecordMemory {
  LeaseRecord* records = nullptr;
  uint32_t slots = 0;
  RegionId region = 0;
};

// The right to advance one lease's progress on one rank. While a writer is alive its record slot is
// not used again, whatever became of the lease: a late Publish can not count for another lease.
class ProgressWriter {
 public:
  explicit ProgressWriter(LeaseRecord* record) : record_(record) {}
  // The engine thread that wrote the KV.
  void Publish(Progress progress) { record_->Publish(progress); }

 private:
  LeaseRecord* record_;
};

// Control thread, except where said. Serves GET_META, START, END, PACKED_READ and PACKED_CANCEL.
class OwnerRank {
 public:
  // `transports` outlive it. All records are made dead before anything else happens.
  OwnerRank(Env& env, LeaderLink& link, RankIdentity identity, RecordMemory memory,
            std::vector<transport::Transport*> transports, uint64_t first_epoch);
  ~OwnerRank();

  // Null when the lease is not live here. Any thread.
  std::shared_ptr<ProgressWriter> Writer(const LeaseId& lease) const;

  struct LeaseInfo {
    LeaseId lease;
    uint32_t slot = 0;
    uint64_t epoch = 0;
    uint32_t tokens = 0;
    Progress progress;
  };
  std::vector<LeaseInfo> List() const;
  uint64_t packed_streams() const { return streams_.size(); }
  const RankIdentity& identity() const { return identity_; }

 private:
  struct Held {
    uint32_t slot = 0;
    uint64_t epoch = 0;
    std::vector<KvTable> tables;
    uint32_t first_token = 0;
    uint32_t tokens = 0;
    uint64_t table_hash = 0;
    Clock::TimerId cap = 0;
  };
  struct StreamKey {
    EngineKey reader;
    uint64_t stream = 0;
    auto operator<=>(const StreamKey&) const = default;
  };
  struct Stream {
    LeaseId lease;
    transport::Transport* transport = nullptr;
    transport::OpId op = 0;
  };

  void OnGetMeta(std::string_view body, const ResponderPtr& responder);
  void OnStart(std::string_view body, const ResponderPtr& responder);
  void OnEnd(std::string_view body, const ResponderPtr& responder);
  void OnPackedRead(std::string_view body, const ResponderPtr& responder);
  void OnPackedCancel(std::string_view body, const ResponderPtr& responder);

  Result<proto::StartReply> StartLease(const proto::Start& start);
  void EndLease(const LeaseId& lease);
  void EndAll();
  Result<uint32_t> TakeSlot();
  Status CheckPackedRead(const proto::PackedRead& read) const;

  Env& env_;
  LeaderLink& link_;
  const RankIdentity identity_;
  const RecordMemory memory_;
  const std::vector<transport::Transport*> transports_;
  const HashKey table_key_;
  uint64_t next_epoch_;

  std::unordered_map<LeaseId, Held> held_;
  std::vector<uint32_t> free_slots_;
  // Slots of ended leases whose writer may still be alive.
  std::deque<std::pair<uint32_t, std::weak_ptr<ProgressWriter>>> retired_;
  // Leases that ended here: a late or repeated START must not revive one. Oldest out.
  std::unordered_set<LeaseId> tombstones_;
  std::deque<LeaseId> tombstone_order_;
  std::map<StreamKey, Stream> streams_;

  mutable std::mutex writers_mutex_;
  std::unordered_map<LeaseId, std::shared_ptr<ProgressWriter>>
      writers_;  // guarded by writers_mutex_
};

}  // namespace kvrelay::agent
