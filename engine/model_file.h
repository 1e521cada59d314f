// Files of a model folder.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
#include "base/unique_fd.h"

namespace kvrelay::engine {

// For reading. kNotFound when there is no such file, kInvalidArgument when it is not a regular one;
// both name the path.
struct RegularFile {
  UniqueFd fd;
  uint64_t bytes = 0;
};
Result<RegularFile> OpenRegularFile(const std::string& path);

// A small file, whole. kInvalidArgument also when it is longer than `max_bytes`.
Result<std::string> ReadTextFile(const std::string& path, uint64_t max_bytes);

}  // namespace kvrelay::engine
