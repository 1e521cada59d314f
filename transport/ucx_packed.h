// The `ucx-packed` transport's parts, for who needs a single one.
#pragma once

#include <memory>

#include "base/status.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// One thread, one UCX worker. `ucx-packed` is some of them side by side. Refuses with a reason when
// this host cannot do it.
Result<std::unique_ptr<Transport>> CreateUcxRail(Options options);

}  // namespace kvrelay::transport
