// The cache memory of an engine's ranks, and the pool that says whose its blocks are.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "engine/engine_options.h"
#include "engine/model_config.h"
#include "engine/pipeline.h"
#include "engine/platform.h"
#include "kvcache/block_pool.h"
#include "kvcache/layout.h"
#include "kvcache/region.h"
#include "kvcache/shard.h"
#include "kvcache/virtual_kv_cache.h"

namespace kvrelay::engine {

// One rank's cache, as it is registered with its agent.
struct KvRank {
  Region region;
  KvLayout layout;
  KvShard shard;
  std::shared_ptr<Device> device = {};  // that has the region; null: the host
};

struct KvMemory {
  std::vector<KvRank> ranks;  // stage by stage
  std::shared_ptr<BlockPool> pool;
  std::shared_ptr<VirtualKvCache> pages;  // of --kv_cache=virtual, else null
  uint64_t bytes = 0;                     // of all ranks: at most so many have memory

  // Each rank's on its device. kInvalidArgument names the flag; kResourceExhausted: no memory
  // (asked and available).
  static Result<KvMemory> Allocate(const ModelConfig& config, const EngineOptions& options,
                                   const std::vector<Stage>& stages, const Platform& platform);
  // Before a step writes token positions[i] % block_size of blocks[i]: the pages have memory, and
  // the next step's will. kResourceExhausted.
  Status Prepare(std::span<const BlockId> blocks, std::span<const uint32_t> positions) const;
};

}  // namespace kvrelay::engine
