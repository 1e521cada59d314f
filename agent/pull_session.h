// One pull on one rank, from start to end: one lease's tokens from every owner rank that holds
// heads we need, into our blocks.
//
//   handshaking -> reading -> finished ok, drained
//   handshaking or reading -> finished with an error -> draining -> drained
//
// The destination blocks belong to the session until it is drained, whatever happened before.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "agent/call.h"
#include "agent/env.h"
#include "agent/packed_window.h"
#include "agent/peer_table.h"
#include "agent/quarantine.h"
#include "agent/source_plan.h"
#include "agent/terms.h"
#include "kvcache/lease_record.h"
#include "kvcache/owned_side.h"
#include "kvcache/plan_pull.h"
#include "kvcache/request_scales.h"
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

  // `env` to `window` outlive it.
  PullSession(Env& env, PeerTable& peers, const RankIdentity& identity, Quarantine& quarantine,
              PackedWindow& window, uint64_t chunk_bytes, proto::Pull pull, Events events);

  void Start();
  // Finishes with `why` unless it finished already. Idempotent.
  void Cancel(const Status& why);

  const proto::Pull& pull() const { return pull_; }
  bool finished() const { return finished_; }
  const char* state() const;

 private:
  // One operation: all that comes of one source, or one piece of a packed stream of it.
  struct Part {
    const proto::ClaimRank& rank;
    uint64_t bytes = 0;
    uint64_t reserved = 0;  // of the quarantine, until the operation has completed
    transport::Transport* transport = nullptr;
    transport::OpId op = 0;  // in flight
    uint64_t stream = 0;     // packed only
    PackedWindow::Id piece = 0;
    GuardExpectation want;
    std::unique_ptr<RetryingCall> request;  // PACKED_READ
  };

  // A piece of a stream that is not asked for yet.
  struct Piece {
    const proto::ClaimRank& rank;
    std::shared_ptr<const ReadyPeer> peer;
    ReadyPeer::Path path;
    StreamShape shape;
    GuardExpectation want;
  };

  void OnPeer(const PullSource& source, const Result<std::shared_ptr<const ReadyPeer>>& peer);
  Status StartSource(const PullSource& source, const std::shared_ptr<const ReadyPeer>& peer);
  // Which of the peer's paths suits the plan best, and has room in quarantine where it needs some.
  Result<ReadyPeer::Path> ChoosePath(const ReadyPeer& peer, const CopyPlan& whole) const;
  Status StartOneSided(const PullSource& source, const ReadyPeer& peer, const ReadyPeer::Path& path,
                       const SourcePlan& plan);
  Status StartPacked(const PullSource& source, const std::shared_ptr<const ReadyPeer>& peer,
                     const ReadyPeer::Path& path, const GuardExpectation& want);
  void OnRoom(PackedWindow::Id id);
  Status StartStream(PackedWindow::Id id, const Piece& piece);
  Part& AddPart(const proto::ClaimRank& rank, transport::Transport* transport, uint64_t bytes,
                const GuardExpectation& want);
  transport::Done OnDone(Part& part);
  void OnPartDone(Part& part, const transport::Completion& completion);
  void Fail(const Status& status);
  void FinishIfDone();
  void DrainIfIdle();
  transport::Terms terms() const { return TermsOf(pull_.lease, pull_.priority, deadline_); }
  OwnedSide OwnerSide(const ReadyPeer& peer, const proto::ClaimRank& rank) const;
  OwnedSide ReaderSide() const;
  std::string Context(const proto::ClaimRank& rank) const;

  Env& env_;
  PeerTable& peers_;
  const RankIdentity& identity_;
  Quarantine& quarantine_;
  PackedWindow& window_;
  const uint64_t chunk_bytes_;
  const proto::Pull pull_;
  Events events_;
  TimePoint started_;
  TimePoint deadline_;
  Clock::TimerId timer_ = 0;
  TakenScales scales_;
  std::deque<Part> parts_;  // stay where they are
  std::map<PackedWindow::Id, Piece> pieces_;
  size_t handshakes_left_ = 0;
  size_t ops_in_flight_ = 0;
  double handshake_ms_ = 0;
  std::string path_;
  bool cast_ = false;
  bool finished_ = false;
  bool failed_ = false;
  bool drained_ = false;
};

}  // namespace kvrelay::agent
