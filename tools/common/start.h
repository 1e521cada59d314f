// The first lines of every program and command.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tools/common/flags.h"

namespace kvrelay::tools {

// argv without the program's name.
std::vector<std::string> Arguments(int argc, char** argv);

// Parses against the process's environment. Returns an exit status when nothing is left to do: help
// or the version were printed (0), or the command line was wrong and that was reported (2, as JSON
// when --json was among the arguments).
std::optional<int> ParseOrFinish(FlagSet& flags, std::span<const std::string> args);

// Reports that the flags do not go together, with a pointer to --help; the exit status.
int FailUsage(const FlagSet& flags, const Status& status, bool json);

}  // namespace kvrelay::tools
