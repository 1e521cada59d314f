// One owner, reached one-sided: the endpoint and the keys to its regions.
#pragma once

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

// Transfer thread only. Open -> closing -> closed; reads in flight hold it.
class GetWay {
 public:
  // `self`: where we are, when the lanes do not leave the host; null when they do.
  // kInvalidArgument for an address that is none, or does not fit what the handshake said of the
  // owner; kIncompatible for another release of UCX; kPeerUnreachable when it is on another host,
  // or UCX finds no lane. A way may be closing already, with the reason in failure().
  static Result<std::shared_ptr<GetWay>> Open(UcxWorker& worker, const PeerSpec& spec,
                                              const HostIdentity* self);

  const std::string& name() const { return spec_.name; }
  std::span<const uint64_t> region_bytes() const { return spec_.region_bytes; }

  // Reads into `into`, which lies in `memory`. The range has been checked. Not after Close.
  void Get(RegionId region, uint64_t offset, std::span<std::byte> into, const UcxMemory& memory,
           UcxGets* gets) {
    const size_t index = 1 + region;
    endpoint_->Get(into, memory, bases_[index] + offset, keys_[index], gets);
  }
  void GetBeacon(std::span<std::byte> into, const UcxMemory& memory, UcxGets* gets) {
    endpoint_->Get(into, memory, bases_[0], keys_[0], gets);
  }

  // Nothing may be posted any more when it is not ok.
  const Status& failure() const { return why_closed_.ok() ? endpoint_->failure() : why_closed_; }
  // Begins a forced close.
  void Close(Status why);
  bool closing() const { return endpoint_->closing(); }
  // Whether no operation of `gets` can write our memory any more. UCX reports operations as ended
  // before it has let go of them when they failed or the way is being closed: then the end of the
  // close is what counts.
  bool Drained(const UcxGets& gets) const {
    const bool clean = gets.failure == UCS_OK && !closing();
    return gets.in_flight == 0 && (clean || endpoint_->closed());
  }
  bool finished() const { return endpoint_->finished(); }
  // Before the worker goes, when the close has not completed.
  void DropKeys() { keys_.clear(); }

 private:
  explicit GetWay(PeerSpec spec) : spec_(std::move(spec)) {}

  const PeerSpec spec_;
  Status why_closed_;
  std::unique_ptr<UcxEndpoint> endpoint_;
  // The beacon's, then the regions'.
  std::vector<uint64_t> bases_;
  std::vector<UcxRemoteKey> keys_;
};

}  // namespace kvrelay::transport
