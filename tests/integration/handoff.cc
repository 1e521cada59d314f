#include "tests/integration/handoff.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "kvcache/copy_host.h"
#include "kvcache/plan_pull.h"

namespace kvrelay::integration {
namespace {

std::unique_ptr<engine::ModelRunner> MakeRunner(const std::string& model_dir, DType dtype) {
  engine::EngineOptions options;
  options.model_dir = model_dir;
  options.kv_dtype = dtype;
  options.kv_blocks = 64;
  options.relay = engine::RelayMode::kOff;
  const auto config = engine::LoadModelConfig(model_dir);
  const auto checkpoint = engine::Checkpoint::Open(model_dir);
  return engine::ModelRunner::Create(*config, *checkpoint, options).value();
}

// The logits behind the last of `ids`, which begin at `position`; none unless `wanted`.
std::vector<float> Run(engine::ModelRunner& runner, std::span<const uint32_t> ids,
                       uint32_t position, std::span<const BlockId> blocks, bool wanted) {
  engine::StepItem item;
  item.token_ids = ids;
  item.first_position = position;
  item.blocks = blocks;
  item.want_logits = wanted;
  const auto results = runner.Step({&item, 1});
  EXPECT_TRUE(results.has_value()) << results.error().ToString();
  return {results->front().logits.begin(), results->front().logits.end()};
}

}  // namespace

Handoff::Handoff(const std::string& model_dir, DType prefill, DType decode)
    : prefill_(MakeRunner(model_dir, prefill)), decode_(MakeRunner(model_dir, decode)) {}

float Handoff::Regret(const proto::Generate& request, std::span<const uint32_t> answer) {
  std::vector<uint32_t> prompt = request.system_ids;
  prompt.insert(prompt.end(), request.token_ids.begin(), request.token_ids.end());
  const auto tokens = static_cast<uint32_t>(prompt.size());
  const auto count = static_cast<uint32_t>(prompt.size() + answer.size());
  const uint32_t size = decode_->block_size();
  const BlockTable from = prefill_->pool()->Allocate((count + size - 1) / size).value();
  const BlockTable to = decode_->pool()->Allocate((count + size - 1) / size).value();

  Run(*prefill_, prompt, 0, from.blocks(), false);
  const engine::KvRank& owner = prefill_->ranks().front();
  const engine::KvRank& reader = decode_->ranks().front();
  const auto plan = PlanPull({owner.layout, owner.shard, {from.blocks()}},
                             {reader.layout, reader.shard, {to.blocks()}}, 0,
                             owner.shard.head_count, {0, tokens});
  const std::byte* const source = owner.region.data();
  std::byte* const target = reader.region.data();
  ExecuteCopy(plan.value(), {&source, 1}, {&target, 1});

  float regret = 0;
  uint32_t last = prompt.back();
  for (uint32_t i = 0; i < answer.size(); ++i) {
    const std::vector<float> logits = Run(*decode_, {&last, 1}, tokens - 1 + i, to.blocks(), true);
    last = answer[i];
    regret = std::max(regret, *std::max_element(logits.begin(), logits.end()) - logits.at(last));
  }
  return regret;
}

}  // namespace kvrelay::integration
