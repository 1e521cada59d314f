// How urgent a transfer is. Where several want the same thread, the same way or the same limit,
// those of the higher priority go first.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/status.h"

namespace kvrelay {

enum class Priority : uint8_t {
  kPrefetch,  // nobody waits for it yet
  kDecode,    // a user waits for it
};

std::string_view PriorityName(Priority priority);  // "prefetch", "decode"
Result<Priority> PriorityFromName(std::string_view name);

}  // namespace kvrelay
