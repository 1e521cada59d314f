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

Duration PollPause(Duration since) {
  using std::chrono::microseconds;
  return std::clamp<Duration>(since / 16, microseconds(50), microseconds(2000));
}

std::span<const TransportKind> TransportKinds() {
  static constexpr std::array<TransportKind, 2> kKinds = {
      {{"mapped", CreateMapped}, {"ucx-packed", CreateUcxPacked}}};
  return kKinds;
}

}  // namespace kvrelay::transport
