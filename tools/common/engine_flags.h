// Flags of an engine, the same for kvrelayd and for `kvrelay generate --local`.
#pragma once

#include <cstdint>
#include <string>

#include "tools/common/flags.h"
#include "tools/common/units.h"

namespace kvrelay::tools {

struct EngineFlags {
  std::string model;  // folder
  uint32_t tp = 1;
  std::string device = "cpu";
  std::string kv_layout = "nhd";
  std::string kv_dtype = "auto";
  uint32_t block_size = 16;      // tokens
  BlockBudget kv_blocks;         // bytes are over all ranks
  uint32_t threads = 0;          // 0: min(affinity, cgroup quota)
  uint32_t prefill_chunk = 256;  // tokens
  uint32_t max_batch = 64;       // requests in one step
  uint32_t max_cached_system_prompts = 100;
  std::string relay = "auto";
};

// Declares all of them; also sets kv_blocks to its default.
void AddEngineFlags(FlagSet& flags, EngineFlags* engine);

}  // namespace kvrelay::tools
