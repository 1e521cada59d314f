// A small pull on the calling thread: no message to the rank, no other thread, nothing to wait for.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "agent/counters.h"
#include "agent/owner_rank.h"
#include "agent/peer_table.h"
#include "agent/source_plan.h"
#include "proto/messages.h"

namespace kvrelay::agent {

// A pull of one rank whose copies are planned. Made when its lease was claimed, so that nothing but
// reading is left when its bytes may move. Neither it nor Run promises anything that a PullSession
// does not do as well: that is the way when there is none, or when Run gives nothing.
class SmallPull {
 public:
  // Nothing when it moves more than transport::kSmallRead, or a source is not connected or cannot
  // be planned. Control thread of the rank `identity`.
  static std::optional<SmallPull> Plan(const PeerTable& peers, const RankIdentity& identity,
                                       const proto::Pull& pull);

  // All or nothing: all was read, each source between two looks at its guard that both held, and
  // counts as a pull of the rank. Nothing when a source gives no memory that we see (any more, see
  // Transport::ReadNow), is not computed yet, or its lease has ended: the destination may hold
  // anything then. Any thread.
  std::optional<proto::PullReply> Run(Counters& counters) const;

 private:
  struct Source {
    std::shared_ptr<const ReadyPeer> peer;
    SourcePlan plan;
  };
  std::vector<Source> sources_;  // at least one
  KvScales scales_;
};

}  // namespace kvrelay::agent
