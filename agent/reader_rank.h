// The reader's side of one rank: carries out the leader's PULL and DROP messages.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "agent/direct_pull.h"
#include "agent/leader_link.h"
#include "agent/peer_table.h"
#include "agent/pull_session.h"

namespace kvrelay::agent {

// Control thread. A pull's number is served once: repeated messages join it, and after its end, or
// after a DROP that came first, the number is refused, because its blocks may be somebody else's by
// then.
class ReaderRank {
 public:
  // `max_asked_bytes`: of packed streams, asked for and not taken; 0: no bound.
  ReaderRank(Env& env, LeaderLink& link, PeerTable& peers, RankIdentity identity,
             uint64_t chunk_bytes, uint64_t max_asked_bytes);

  struct SessionInfo {
    uint64_t number = 0;
    std::string peer;
    std::string state;
    uint32_t tokens = 0;
    uint32_t blocks = 0;
  };
  std::vector<SessionInfo> List() const;

  // For a leader on the same thread: the pull without a PULL, if there is a way.
  std::optional<DirectPull> PlanDirect(const proto::Pull& pull) const;

 private:
  struct Running {
    std::shared_ptr<PullSession> session;
    std::vector<ResponderPtr> pulls;  // waiting for the result
    std::vector<ResponderPtr> drops;  // waiting until it is drained
  };

  void OnPull(std::string_view body, const ResponderPtr& responder);
  void OnDrop(std::string_view body, const ResponderPtr& responder);
  void OnFinished(uint64_t number, const Result<proto::PullReply>& result);
  void OnDrained(uint64_t number);
  void CancelAll();
  bool Ended(uint64_t number) const;
  void MarkEnded(uint64_t number);

  Env& env_;
  LeaderLink& link_;
  PeerTable& peers_;
  const RankIdentity identity_;
  const uint64_t chunk_bytes_;
  Quarantine quarantine_;
  PackedWindow window_;
  std::map<uint64_t, Running> running_;
  // Numbers that are over: all below ended_below_, and those in the set.
  uint64_t ended_below_ = 0;
  std::set<uint64_t> ended_;
};

}  // namespace kvrelay::agent
