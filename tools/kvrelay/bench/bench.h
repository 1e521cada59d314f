// kvrelay bench: measures this build on this machine.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "base/status.h"
#include "tools/kvrelay/command.h"

namespace kvrelay::tools {

int BenchPullCommand(CommandArgs args);
int BenchSmallCommand(CommandArgs args);
int BenchControlCommand(CommandArgs args);

// What a figure depends on besides the code: processor, cores, load, versions.
nlohmann::ordered_json MachineJson();

// Runs `bench` with a folder of its own, gone afterwards; writes its report to stdout, or its
// failure. The exit code.
int InTemporaryFolder(std::string_view program, bool json,
                      const std::function<Result<std::string>(const std::string& folder)>& bench);

}  // namespace kvrelay::tools
