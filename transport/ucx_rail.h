// One thread, one UCX worker and its connections: the owner packs and sends, the reader unpacks,
// over UCX active messages. `ucx-packed` is some of them side by side.
#pragma once

#include <memory>

#include "base/status.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// Packed streams only. Refuses with a reason when this host cannot do it.
Result<std::unique_ptr<Transport>> CreateUcxRail(Options options);

}  // namespace kvrelay::transport
