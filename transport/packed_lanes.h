// The connections of one carrier, shared by everything that talks to the same process.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "transport/packed_carrier.h"
#include "transport/slot_ring.h"

namespace kvrelay::transport {

// Transfer thread only, like everything here.
class PackedLane {
 public:
  explicit PackedLane(std::unique_ptr<PackedEndpoint> endpoint) : endpoint_(std::move(endpoint)) {}

  bool usable() const { return endpoint_->failure().ok() && !endpoint_->closing(); }
  // Why it is not usable (any more).
  Status failure() const;
  uint32_t in_flight() const { return in_flight_; }  // slots
  // When the reader last took something, or had nothing left to take.
  TimePoint last_progress() const { return last_progress_; }

  // Sends the slot's header and the first header.bytes of its data. The slot goes back to `ring`
  // when the carrier reads it no more. `sent` may run inside the call.
  void SendSlot(Slot* slot, SlotRing& ring, TimePoint now, PackedEndpoint::Sent sent);
  // Sends a message that owns its bytes.
  void SendOwned(PackedHeader header, std::string data);

 private:
  friend class PackedLanes;
  const std::unique_ptr<PackedEndpoint> endpoint_;
  uint32_t in_flight_ = 0;
  TimePoint last_progress_;
  TimePoint last_used_;
  Status why_closed_;
  // Sends that a forced close has ended: UCX calls them done before it has let go of the
  // connection.
  std::vector<std::pair<Slot*, SlotRing*>> held_;
};

// Lanes by PackedAddress::Encode(), so by process and incarnation. Those that nobody holds any more
// stay open, the least recently used go beyond kMaxIdle.
class PackedLanes {
 public:
  static constexpr size_t kMaxIdle = 64;
  static constexpr size_t kMaxLanes = 1024;

  // Destroy them after the carrier.
  explicit PackedLanes(PackedCarrier& carrier) : carrier_(carrier) {}

  // kInvalidArgument for what is no address, or one of another incarnation than `incarnation`;
  // kIncompatible for one that the carrier cannot use; kOverloaded at kMaxLanes.
  Result<std::shared_ptr<PackedLane>> Open(const std::string& encoded, Incarnation incarnation,
                                           TimePoint now);
  // Gives the connection up with all that is in flight on it; holders see it as unusable.
  void Close(const std::shared_ptr<PackedLane>& lane, Status why);
  void CloseAll();
  // Closes what has failed and what is idle beyond bounds; frees what has closed.
  void Reap();

  // Every lane that is not being closed.
  const std::map<std::string, std::shared_ptr<PackedLane>>& open() const { return open_; }
  // Lanes whose forced close has not completed.
  size_t closing() const { return closing_.size(); }

 private:
  PackedCarrier& carrier_;
  std::map<std::string, std::shared_ptr<PackedLane>> open_;
  std::list<std::shared_ptr<PackedLane>> closing_;
};

}  // namespace kvrelay::transport
