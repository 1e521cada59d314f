#include "engine/pipeline.h"

#include <algorithm>
#include <numeric>
#include <string>

namespace kvrelay::engine {
namespace {

std::vector<uint32_t> EvenSplit(uint32_t layers, uint32_t pp) {
  std::vector<uint32_t> split;
  for (uint32_t stage = 0; stage < pp; ++stage) {
    split.push_back(layers / pp + (stage < layers % pp ? 1 : 0));
  }
  return split;
}

std::string Text(const std::vector<uint32_t>& numbers) {
  std::string text;
  for (const uint32_t number : numbers) text += (text.empty() ? "" : ",") + std::to_string(number);
  return text;
}

}  // namespace

Result<std::vector<Stage>> MakeStages(const ModelConfig& config, uint32_t pp, uint32_t tp,
                                      const std::vector<uint32_t>& layers) {
  if (pp > config.num_layers) {
    return Error(Code::kInvalidArgument,
                 "pp = " + std::to_string(pp) +
                     " is more than num_hidden_layers = " + std::to_string(config.num_layers));
  }
  const std::vector<uint32_t> split = layers.empty() ? EvenSplit(config.num_layers, pp) : layers;
  if (split.size() != pp || std::ranges::count(split, 0U) > 0 ||
      std::accumulate(split.begin(), split.end(), uint64_t{0}) != config.num_layers) {
    return Error(Code::kInvalidArgument, "pp_layers = " + Text(split) +
                                             " are not the layers of pp = " + std::to_string(pp) +
                                             " stages, at least one each, " +
                                             std::to_string(config.num_layers) + " in all");
  }
  std::vector<Stage> stages;
  uint32_t begin = 0;
  for (const uint32_t count : split) {
    stages.push_back({begin, begin + count, std::make_unique<TpGroup>(tp)});
    begin += count;
  }
  return stages;
}

Result<KvShard> ShardOf(const ModelConfig& config, const Stage& stage, uint32_t tp_rank) {
  KVRELAY_ASSIGN_OR_RETURN(KvShard shard, KvShard::Make(config.num_layers, config.num_kv_heads,
                                                        stage.group->size(), tp_rank));
  shard.layer_begin = stage.layer_begin;
  shard.layer_count = stage.layers();
  return shard;
}

}  // namespace kvrelay::engine
