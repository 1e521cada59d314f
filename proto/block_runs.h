// Block ids as few bytes: runs of consecutive ids, each as the distance from where the one before
// ended. Private to proto/. PROTOCOL.md has the format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kvcache/layout.h"

namespace kvrelay::proto {

std::string PackBlocks(std::span<const BlockId> blocks);

// Any bytes. kInvalidArgument says what is wrong with them ("has more than 7 blocks"); memory is
// taken for at most `max` blocks.
Result<std::vector<BlockId>> UnpackBlocks(std::string_view bytes, size_t max);

}  // namespace kvrelay::proto
