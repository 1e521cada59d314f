// What a transport is to its caller, whatever moves the bytes: ids, and callbacks that run on the
// control thread, never inside a call.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <utility>

#include "base/status.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// Outlives the transport's own thread. What it has queued in the executor may run after its end.
class ControlSide {
 public:
  explicit ControlSide(Executor executor) : executor_(std::move(executor)) {}

  // --- Control thread

  // A new PeerHandle or OpId; both are of one sequence.
  uint64_t NextId() { return next_id_++; }
  // A new peer with the callbacks of its Connect, kept here until they are used up.
  PeerHandle Watch(std::function<void(Result<PeerHandle>)> connected,
                   std::function<void()> on_death);
  // For Disconnect: neither callback is called any more, though a call of it may be queued.
  void Forget(PeerHandle peer) { watched_->erase(peer); }
  // Refuses an operation within the call that would start it: its id.
  OpId RefuseStart(Done done, Status why) {
    Refuse(std::move(done), std::move(why));
    return NextId();
  }

  // --- Any thread

  void Deliver(Done done, Completion completion) const;
  // Completes an operation that was never started.
  void Refuse(Done done, Status why) const;
  // The way to the peer was used: tells `connected`. Once at most.
  void Connected(PeerHandle peer) const;
  // The way to the peer is lost, and operations on it have been delivered: tells `on_death`, or, if
  // it had not been Connected, `connected` the reason. The last word of a peer.
  void Lost(PeerHandle peer, Status why) const;

 private:
  struct Callbacks {
    std::function<void(Result<PeerHandle>)> connected;  // null once it was called
    std::function<void()> on_death;
  };
  using Watched = std::map<PeerHandle, Callbacks>;

  const Executor executor_;
  // Control thread.
  uint64_t next_id_ = 1;
  const std::shared_ptr<Watched> watched_ = std::make_shared<Watched>();
};

}  // namespace kvrelay::transport
