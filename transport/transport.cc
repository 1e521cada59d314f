#include "transport/transport.h"

#include <algorithm>
#include <array>
#include <utility>

namespace kvrelay::transport {

NextPortion Whole(CopyPlan plan) {
  return [plan = std::move(plan)](const GuardWords&) mutable -> Result<Portion> {
    return Portion{std::move(plan), true};
  };
}

Status CheckGuard(const GuardRef& guard, std::span<const uint64_t> peer_region_bytes) {
  if (guard.region >= peer_region_bytes.size() || guard.offset % alignof(LeaseRecord) != 0 ||
      peer_region_bytes[guard.region] < sizeof(LeaseRecord) ||
      guard.offset > peer_region_bytes[guard.region] - sizeof(LeaseRecord)) {
    return Error(Code::kInvalidArgument, "the guard at offset " + std::to_string(guard.offset) +
                                             " of region " + std::to_string(guard.region) +
                                             " is not a record of the peer's " +
                                             std::to_string(peer_region_bytes.size()) + " regions");
  }
  return {};
}

Duration PollPause(Duration since) {
  using std::chrono::microseconds;
  return std::clamp<Duration>(since / 16, microseconds(50), microseconds(2000));
}

std::span<const TransportKind> TransportKinds() {
  // Mapped memory is the fastest. One-sided reads cost the owner's processors nothing, but on one
  // host a system call each: short runs go packed even so.
  static constexpr std::array<TransportKind, 4> kKinds = {
      {{.name = "mapped", .create = CreateMapped, .devices = true},
       {.name = "ucx-get", .create = CreateUcxGet, .open_ports = true},
       {.name = "ucx-packed", .create = CreateUcxPacked, .open_ports = true, .devices = true},
       {.name = "zmq-packed", .create = CreateZmqPacked, .devices = true, .encrypts = true}}};
  return kKinds;
}

}  // namespace kvrelay::transport
