// Runs a model over a KV cache in blocks: owns the ranks, pipeline stages of tensor-parallel ones,
// their weights and their cache memory, and the pool that says whose the blocks are. One Step runs
// any mix of prompt chunks and single decoding tokens, through one stage after the other.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "attention/backend.h"
#include "base/status.h"
#include "engine/checkpoint.h"
#include "engine/engine_options.h"
#include "engine/kv_memory.h"
#include "engine/model.h"
#include "engine/model_config.h"
#include "engine/pipeline.h"
#include "engine/platform.h"
#include "kvcache/block_pool.h"
#include "kvcache/kv_view.h"
#include "kvcache/lease_record.h"
#include "kvcache/region.h"
#include "kvcache/shard.h"

namespace kvrelay::engine {

// How far one sequence's chunk is, in positions of its token sequence. Runs on the thread of `rank`
// while it computes (so must be quick): after each layer, and with tokens == the chunk's end once
// all layers that the rank holds are written.
using ProgressFn = std::function<void(uint32_t rank, const Progress& progress)>;

// Tokens of one sequence to run in a step. Spans are valid during Step.
struct StepItem {
  std::span<const uint32_t> token_ids{};  // at least one; below the vocabulary's size
  uint32_t first_position = 0;            // of token_ids[0]; everything before is in the cache
  std::span<const BlockId> prefix{};      // blocks of the shared prefix
  std::span<const BlockId>
      blocks;  // its own, from token prefix.size() * block_size on; hold all of token_ids
  bool want_token = false;   // the likeliest behind its last one
  bool want_logits = false;  // the logits of its last token
  std::span<const ProgressFn* const> progress{};
};

// What a step says about one item.
struct ItemResult {
  std::optional<uint32_t> token;  // if it, or logits, were wanted; the lowest id of equals
  std::span<const float> logits;  // empty unless wanted; valid until the next Step
  bool relay = false;             // it ran relay attention
  std::string why;                // "prefix shared by 16", "no prefix", ...
};

// Step: one thread at a time. Everything else: any thread.
class ModelRunner {
 public:
  // kInvalidArgument: the model does not fit `options` (both numbers are named), or the platform.
  // kIncompatible: see Platform::ChooseAttnBackend.
  // kResourceExhausted: no memory for the cache (asked and available).
  static Result<std::unique_ptr<ModelRunner>> Create(
      const ModelConfig& config, const Checkpoint& checkpoint, const EngineOptions& options,
      std::shared_ptr<const Platform> platform = HostPlatform());

  // Results by item. kInvalidArgument for items that break their contract, before anything is
  // written. After another error the KV of the step's tokens is undefined.
  Result<std::vector<ItemResult>> Step(std::span<const StepItem> items);

  const ModelConfig& config() const { return config_; }
  const attention::BackendChoice& attn_backend() const { return attn_backend_; }
  uint32_t tp_size() const { return stages_.front().group->size(); }
  uint32_t pp_size() const { return static_cast<uint32_t>(stages_.size()); }
  uint32_t block_size() const { return block_size_; }
  const std::vector<KvRank>& ranks() const { return kv_.ranks; }  // stage by stage
  const std::shared_ptr<BlockPool>& pool() const { return kv_.pool; }
  const VirtualKvCache* virtual_cache() const { return kv_.pages.get(); }  // null: paged
  uint64_t kv_bytes() const { return kv_.bytes; }                          // of all ranks

 private:
  // The rows of a step, one item's after the other; kept between steps.
  struct Rows {
    std::vector<uint32_t> token_ids;
    std::vector<uint32_t> positions;
    std::vector<BlockId> blocks;
    std::vector<attention::Sequence> sequences;  // by item
    std::vector<uint32_t> logit_rows;
    std::vector<ScoredToken> likeliest;
    std::vector<float> logits;
    std::array<std::vector<float>, 2> between;  // stages: out of one, into the next
  };

  ModelRunner(const ModelConfig& config, const EngineOptions& options,
              std::shared_ptr<const Platform> platform, attention::BackendChoice attn_backend,
              std::vector<Stage> stages, KvMemory kv);
  // Measures the scales of caches that want some (engine/kv_scales.h).
  Status ScaleCaches(const EngineOptions& options);
  Status Check(const StepItem& item) const;
  void GatherRows(std::span<const StepItem> items);
  uint32_t LikeliestOf(size_t logit_row) const;
  Status RunStages(const StepRows& step, std::span<const StepItem> items);
  static void Report(std::span<const StepItem> items, uint32_t rank, uint32_t layers,
                     uint32_t all_layers);

  const ModelConfig config_;
  const uint32_t block_size_;
  const std::shared_ptr<const Platform> platform_;
  const attention::BackendChoice attn_backend_;
  const attention::RelayConfig relay_;
  const std::vector<Stage> stages_;
  KvMemory kv_;                // does not change once it has its scales
  std::vector<KvView> views_;  // by rank
  ModelShards shards_;         // by rank
  Rows rows_;
};

}  // namespace kvrelay::engine
