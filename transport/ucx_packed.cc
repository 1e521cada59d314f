// The `ucx-packed` transport.
#include <algorithm>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "transport/striped.h"
#include "transport/transport.h"
#include "transport/ucx_rail.h"

namespace kvrelay::transport {
namespace {

// A rail keeps one thread of either side busy, and the other side is often on the same host: two
// rails there use four processors.
uint32_t RailsFor(uint32_t processors) { return processors >= 4 ? 2 : 1; }

}  // namespace

Result<std::unique_ptr<Transport>> CreateUcxPacked(Options options) {
  const uint32_t count = std::min<uint32_t>(
      options.rails == 0 ? RailsFor(std::thread::hardware_concurrency()) : options.rails,
      StripedAddress::kMaxRails);
  std::vector<std::unique_ptr<Transport>> rails;
  for (uint32_t i = 0; i < count; ++i) {
    KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<Transport> rail, CreateUcxRail(options));
    rails.push_back(std::move(rail));
  }
  return Stripe(std::move(rails), options.executor);
}

}  // namespace kvrelay::transport
