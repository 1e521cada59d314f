// One thread, one carrier and its connections: the owner packs and sends, the reader unpacks. A
// packed transport is some of them side by side.
#pragma once

#include <memory>

#include "base/status.h"
#include "transport/packed_carrier.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// Packed streams only, named as the carrier.
Result<std::unique_ptr<Transport>> CreatePackedRail(Options options,
                                                    std::unique_ptr<PackedCarrier> carrier);

}  // namespace kvrelay::transport
