// Flags of an engine, the same for kvrelayd and for `kvrelay generate --local`.
#pragma once

#include <string>

#include "engine/engine_options.h"
#include "tools/common/flags.h"

namespace kvrelay::tools {

struct EngineFlags {
  engine::EngineOptions options;
  std::string device = "cpu";
};

// Declares all of them on `flags`; `engine` must not move from here on. `when` follows the headings
// in the help: " (with --local)".
void AddEngineFlags(FlagSet& flags, EngineFlags* engine, const std::string& when = "");

}  // namespace kvrelay::tools
