// Flags of an engine, the same for kvrelayd and for `kvrelay generate --local`.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine_options.h"
#include "engine/platform.h"
#include "tools/common/flags.h"

namespace kvrelay::tools {

struct EngineFlags {
  engine::EngineOptions options;
  std::vector<int> gpus;       // of each rank, or one for all; empty: the host computes
  std::optional<DType> dtype;  // nothing: fp32 on the host, bf16 on GPUs
};

// Where the flags say that the engine computes. kInvalidArgument for arithmetic that the host does
// not do; errors as engine::cuda::OpenPlatform.
Result<std::shared_ptr<const engine::Platform>> OpenPlatform(const EngineFlags& engine);

// Declares all of them on `flags`; `engine` must not move from here on. `when` follows the headings
// in the help: " (with --local)".
void AddEngineFlags(FlagSet& flags, EngineFlags* engine, const std::string& when = "");

}  // namespace kvrelay::tools
