// Where log lines go: stderr, at or above --log_level.
#pragma once

#include <string>

#include "tools/common/flags.h"

namespace kvrelay::tools {

// Declares --log_level (debug|info|warning|error) on `flags`.
void AddLogFlag(FlagSet& flags, std::string* level);
// Call once, after flags are parsed. `program` is argv[0]; it must live as long as the process.
void StartLogging(const char* program, const std::string& level);

}  // namespace kvrelay::tools
