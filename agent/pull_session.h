// One pull on one rank, from start to end: one lease's tokens from every owner rank that holds
// heads we need, into our blocks.
//
//   handshaking -> reading -> finished ok, drained
//   handshaking or reading -> finished with an error -> draining -> drained
//
// The destination blocks belong to the session until it is drained, whatever happened before.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "agent/call.h"
#include "agent/env.h"
#include "agent/peer_table.h"
#include "agent/quarantine.h"
#include "kvcache/lease_record.h"
#include "kvcache/plan_pull.h"
#include "kvcache/stream_chunks.h"

namespace kvrelay::agent {

// Control thread. May be destroyed only when drained, or with the whole process's control loop
// stopped.
class PullSession : public std::enable_shared_from_this<PullSession> {
 public:
  struct Events {
    std::function<void(Result<proto::PullReply>)> finished;  // exactly once, never inside Start
    std::function<void()> drained;                           // exactly once, not before `finished`
  };

  // `env` to `quarantine` outlive it.
  PullSession(Env& env, PeerTable& peers, const RankIdentity& identity, Quarantine& quarantine,
              uint64_t chunk_bytes, proto::Pull pull, Events events);

  void Start();
  // Finishes with `why` unless it finished already. Idempotent.
  void Cancel(const Status& why);

  const proto::Pull& pull() const { return pull_; }
  bool finished() const { return finished_; }
  const char* state() const;

 private:
  struct Part {
    PullSource source;
    uint64_t bytes = 0;
    uint64_t reserved = 0;  // of the quarantine, until the operation has completed
    transport::Transport* transport = nullptr;
    transport::OpId op = 0;  // in flight
    uint64_t stream = 0;     // packed only
    GuardExpectation want;
    std::unique_ptr<RetryingCall> request;  // PACKED_READ
    Status refused;                         // the owner's answer to it
    bool done = false;
  };

  void OnPeer(size_t index, const Result<std::shared_ptr<const ReadyPeer>>& peer);
  Status StartPart(Part& part, const ReadyPeer& peer);
  // Which of the peer's paths suits the part best, with room reserved where it needs some.
  Result<ReadyPeer::Path> ChoosePath(Part& part, const ReadyPeer& peer, const CopyPlan& whole);
  Status StartOneSided(Part& part, const ReadyPeer& peer, transport::PeerHandle handle,
                       const proto::ClaimRank& rank, const CopyPlan& whole);
  Status StartPacked(Part& part, const ReadyPeer& peer, transport::PeerHandle handle,
                     const proto::ClaimRank& rank);
  transport::Done OnDone(const Part& part);
  void OnPartDone(size_t index, const transport::Completion& completion);
  void Fail(const Status& status);
  void FinishIfDone();
  void DrainIfIdle();
  std::string Context(const Part& part) const;

  Env& env_;
  PeerTable& peers_;
  const RankIdentity& identity_;
  Quarantine& quarantine_;
  const uint64_t chunk_bytes_;
  const proto::Pull pull_;
  Events events_;
  TimePoint started_;
  TimePoint deadline_;
  Clock::TimerId timer_ = 0;
  std::vector<Part> parts_;
  size_t handshakes_left_ = 0;
  size_t ops_in_flight_ = 0;
  double handshake_ms_ = 0;
  std::string path_;
  bool finished_ = false;
  bool failed_ = false;
  bool drained_ = false;
};

}  // namespace kvrelay::agent
