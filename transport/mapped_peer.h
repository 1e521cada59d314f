// The reader's side of `mapped`: one owner's regions, mapped read-only, for as long as the owner
// lives.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "base/unique_fd.h"
#include "transport/event_loop.h"
#include "transport/mapped_address.h"
#include "transport/mapped_memory.h"
#include "transport/mapper.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// Transfer thread only. Connecting -> ready -> dead; the destructor closes and unmaps in each.
class MappedPeer {
 public:
  // The outcome of connecting, and later at most once the owner's end. Must not destroy the peer.
  using OnState = std::function<void(Status)>;

  // `loop` and `mapper` outlive the peer. `on_state` is called on the transfer thread, never from
  // here: kOk when every region is mapped; an error when that failed, or (after kOk) when the owner
  // has ended.
  MappedPeer(EventLoop& loop, PeerSpec spec, HostIdentity self, Mapper& mapper, OnState on_state);
  ~MappedPeer();

  // Tries to connect (again). Call it first, and then whenever retry_at() has come.
  void Retry();
  TimePoint retry_at() const { return retry_at_; }  // max() when there is nothing to retry

  // Enters some more of the regions into our page tables, in a tenth of a millisecond; false when
  // all are.
  bool PopulateNext();

  bool mapping() const { return mapping_; }  // it has given its regions
  bool ready() const { return ready_; }
  const PeerSpec& spec() const { return spec_; }
  // Once it is ready; it does not change any more. Null when the owner has ended.
  std::shared_ptr<const MappedMemory> memory() const { return memory_; }

 private:
  Status Connect();
  void OnReady();
  Status ReceiveRegions();
  void OnMapped(Result<std::shared_ptr<MappedMemory>> memory);
  void Fail(Status status);

  EventLoop& loop_;
  const PeerSpec spec_;
  const HostIdentity self_;
  Mapper& mapper_;
  const OnState on_state_;
  TimePoint retry_at_ = TimePoint::max();
  UniqueFd fd_;
  std::vector<AnnouncedRegion> announced_;  // until all are
  bool mapping_ = false;                    // all were announced
  bool ready_ = false;
  std::shared_ptr<MappedMemory> memory_;
  size_t populated_ = 0;  // of its host regions, wholly
  // What is mapped for a peer that is gone is not taken.
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace kvrelay::transport
