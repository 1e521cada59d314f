// Pipeline parallelism: which layers of a model which ranks hold and run.
//
// Ranks are numbered stage by stage: rank = stage * tp + tensor-parallel rank.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "engine/model_config.h"
#include "engine/tp_group.h"
#include "kvcache/shard.h"

namespace kvrelay::engine {

// Consecutive layers, and the tensor-parallel ranks that run them.
struct Stage {
  uint32_t layer_begin = 0;
  uint32_t layer_end = 0;
  std::unique_ptr<TpGroup> group;

  uint32_t layers() const { return layer_end - layer_begin; }
};

// `layers[i]` layers for stage i, or, when it is empty, as even as it goes, the last stage never
// the longest: it has the head, too. kInvalidArgument, with the numbers, when `pp` stages of at
// least one layer can not be made of them.
Result<std::vector<Stage>> MakeStages(const ModelConfig& config, uint32_t pp, uint32_t tp,
                                      const std::vector<uint32_t>& layers);

// What tensor-parallel rank `tp_rank` of the stage holds.
Result<KvShard> ShardOf(const ModelConfig& config, const Stage& stage, uint32_t tp_rank);

}  // namespace kvrelay::engine
