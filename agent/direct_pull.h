// A pull on the calling thread: no message to the rank, no other thread to wake.
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

// A pull of one rank whose copies are planned: when its lease was claimed, so that nothing but
// moving is left when its bytes may move. A small one is copied here and now; what a device moves
// is begun, and looked at until it is done. Nothing of it promises what a PullSession does not do
// as well: that is the way when there is none, or when it comes to nothing.
//
// Begin once, then Look while it says kReading. The destructor waits for a device that is at it:
// the time of a copy.
class DirectPull {
 public:
  // Nothing when it moves more than transport::kSmallRead and no device does, or a source is not
  // connected or cannot be planned. Control thread of the rank `identity`.
  static std::optional<DirectPull> Plan(const PeerTable& peers, const RankIdentity& identity,
                                        const proto::Pull& pull);

  enum class State : uint8_t {
    kReading,  // a device is at it
    kRead,     // all of it, each source between two looks at its guard that both held
    // A source gives no memory that we see (any more), is not computed yet, or its lease has ended.
    // The destination may hold anything, and nothing writes it any more.
    kNothing,
  };
  // Waits for a device as long as another thread takes to wake, if the pull is small. One thread at
  // a time, like Look.
  State Begin();
  State Look();

  // Since Begin.
  Duration age() const;
  // Of one that was read: it counts as a pull of the rank.
  proto::PullReply Reply(Counters& counters) const;

 private:
  struct Source {
    std::shared_ptr<const ReadyPeer> peer;
    SourcePlan plan;
    std::unique_ptr<transport::BegunRead> read;  // while a device is at it

    const ReadyPeer::Path& path() const { return peer->paths.front(); }
    bool Begin();
    bool Holds(const transport::Completion& completion) const;
  };
  std::vector<Source> sources_;  // at least one
  KvScales scales_;
  uint64_t bytes_ = 0;  // of all sources
  TimePoint began_;
  std::optional<TimePoint> ended_;  // when nothing was seen to move any more
  bool failed_ = false;
};

}  // namespace kvrelay::agent
