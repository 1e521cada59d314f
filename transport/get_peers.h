// The owners that a transport reads one-sided: from the first look at one to the end of all that
// was in flight on the way to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "base/clock.h"
#include "base/status.h"
#include "transport/control_side.h"
#include "transport/get_address.h"
#include "transport/get_reads.h"
#include "transport/get_way.h"
#include "transport/guard_pads.h"
#include "transport/transport.h"
#include "transport/ucx_one_sided.h"
#include "transport/ucx_worker.h"

namespace kvrelay::transport {

// Transfer thread only. A peer is connected when its beacon was read and is the right one.
class GetPeers {
 public:
  static constexpr size_t kMaxConnecting = 256;

  // `self`: where we are.
  GetPeers(UcxWorker& worker, const OneSidedLanes& lanes, const HostIdentity& self, GuardPads& pads,
           const ControlSide& control)
      : worker_(worker), lanes_(lanes), self_(self), pads_(pads), control_(control) {}

  // Tells `control` the outcome by the deadline, and later of the peer's end.
  void Connect(PeerHandle handle, const PeerSpec& spec, TimePoint deadline, TimePoint now);
  // Ends the way to it.
  void Disconnect(PeerHandle handle, TimePoint now);
  // Tells those that are connecting.
  void DisconnectAll(const Status& why, TimePoint now);

  // Null when the peer is not connected (any more).
  std::shared_ptr<GetWay> Find(PeerHandle handle) const;

  // Takes beacons that have arrived, ends what is late or has failed, closes ways on which nothing
  // moves any more, and forgets those that have closed. Of an end is told when no read of the peer
  // is left. Returns when to look again.
  TimePoint Look(TimePoint now, const GetReads& reads);
  bool empty() const { return peers_.empty(); }
  // Those that are over and not forgotten.
  size_t closing() const;

  // Before the worker goes, when closes have not completed.
  void DropKeys();

 private:
  struct Peer {
    enum class State : uint8_t { kConnecting, kConnected, kOver } state = State::kConnecting;
    TimePoint deadline;  // of connecting
    Incarnation incarnation = 0;
    std::shared_ptr<GetWay> way;
    // The read of the beacon, until it is drained.
    std::byte* pad = nullptr;
    UcxGets gets = {};
  };

  void TakeBeacon(PeerHandle handle, Peer& peer, TimePoint now);
  void End(PeerHandle handle, Peer& peer, const Status& why, TimePoint now);

  UcxWorker& worker_;
  const OneSidedLanes& lanes_;
  const HostIdentity& self_;
  GuardPads& pads_;
  const ControlSide& control_;
  std::map<PeerHandle, Peer> peers_;
};

}  // namespace kvrelay::transport
