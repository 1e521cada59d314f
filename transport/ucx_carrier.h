// Packed streams over UCX active messages.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "transport/packed_carrier.h"

namespace kvrelay::transport {

// `interface`: the only one that data crosses; empty: loopback. `message_bytes`: of the largest
// message's data. Refuses with a reason when this host cannot do it.
Result<std::unique_ptr<PackedCarrier>> CreateUcxCarrier(const std::string& interface,
                                                        uint64_t message_bytes);

}  // namespace kvrelay::transport
