// Small files of a model folder, read whole.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"

namespace kvrelay::engine {

// kNotFound when there is no such file, kInvalidArgument when it is longer than `max_bytes` or not
// a regular file; both name the path.
Result<std::string> ReadTextFile(const std::string& path, uint64_t max_bytes);

}  // namespace kvrelay::engine
