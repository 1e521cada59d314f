// One owner, reached one-sided: the endpoint and the keys to its regions.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "transport/get_address.h"
#include "transport/ucx_endpoint.h"
#include "transport/ucx_memory.h"

namespace kvrelay::transport {

// Transfer thread only. Open -> ended (nothing is posted any more, what is in flight may end by
// itself) -> closing -> closed; reads in flight hold it.
class GetWay : public std::enable_shared_from_this<GetWay> {
 public:
  // How long what is in flight may take to end by itself.
  static constexpr Duration kDrainLimit = std::chrono::milliseconds(500);

  // `self`: where we are, when the lanes do not leave the host; null when they do.
  // kInvalidArgument for an address that is none, or does not fit what the handshake said of the
  // owner; kIncompatible for another release of UCX; kPeerUnreachable when it is on another host,
  // or UCX finds no lane. A way may be closing already, with the reason in failure().
  static Result<std::shared_ptr<GetWay>> Open(UcxWorker& worker, const PeerSpec& spec,
                                              const HostIdentity* self);

  const std::string& name() const { return spec_.name; }
  std::span<const uint64_t> region_bytes() const { return spec_.region_bytes; }

  // Reads into `into`, which lies in `memory`. The range has been checked. Not after End.
  void Get(RegionId region, uint64_t offset, std::span<std::byte> into, const UcxMemory& memory,
           UcxGets* gets) {
    const size_t index = 1 + region;
    endpoint_->Get(into, memory, bases_[index] + offset, keys_[index], gets);
  }
  void GetBeacon(std::span<std::byte> into, const UcxMemory& memory, UcxGets* gets) {
    endpoint_->Get(into, memory, bases_[0], keys_[0], gets);
  }

  // Nothing may be posted any more when it is not ok.
  const Status& failure() const { return why_ended_.ok() ? endpoint_->failure() : why_ended_; }
  // Ends it, the first time. What is in flight has until `close_by`.
  void End(Status why, TimePoint close_by);
  bool ended() const { return !why_ended_.ok(); }
  TimePoint close_by() const { return close_by_; }
  // Begins a forced close of an ended way.
  void Close();
  bool closing() const { return endpoint_->closing(); }
  // The close has completed, and all that it leaves behind: nothing of this way writes our memory.
  bool closed() const { return closed_ && endpoint_->finished(); }
  // Whether no operation of `gets` can write our memory any more. UCX reports operations as ended
  // before it has let go of them when they failed or the way is being closed: then the end of the
  // close is what counts.
  bool Drained(const UcxGets& gets) const {
    const bool clean = gets.failure == UCS_OK && !closing();
    return gets.in_flight == 0 && (clean || closed());
  }
  // Before the worker goes, when the close has not completed.
  void DropKeys() { keys_.clear(); }

 private:
  GetWay(UcxWorker& worker, PeerSpec spec) : worker_(worker), spec_(std::move(spec)) {}

  UcxWorker& worker_;
  const PeerSpec spec_;
  Status why_ended_;
  TimePoint close_by_ = TimePoint::max();
  bool closed_ = false;
  std::unique_ptr<UcxEndpoint> endpoint_;
  // The beacon's, then the regions'.
  std::vector<uint64_t> bases_;
  std::vector<UcxRemoteKey> keys_;
};

}  // namespace kvrelay::transport
