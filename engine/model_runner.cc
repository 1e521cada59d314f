#include "engine/model_runner.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/cpu.h"
#include "base/parallel.h"
#include "engine/kv_scales.h"

namespace kvrelay::engine {
namespace {

attention::RelayConfig RelayConfigFor(RelayMode mode, attention::Backend backend) {
  attention::RelayConfig config;
  config.enabled = mode != RelayMode::kOff && attention::TraitsOf(backend).relays;
  if (mode == RelayMode::kOn) config.min_sharers = 1;
  return config;
}

KvView ViewOf(const KvRank& rank) { return {rank.layout, {rank.region.data()}}; }

// What `relay` means for each item.
void Explain(const attention::RelayConfig& config, const attention::RelayMetadata& relay,
             std::span<const StepItem> items, std::vector<ItemResult>& results) {
  for (const auto& group : relay.groups) {
    if (group.level > 0) continue;  // the root says how many share
    for (const uint32_t item : group.sequences) {
      results[item].relay = true;
      results[item].why = "prefix shared by " + std::to_string(group.sequences.size());
    }
  }
  const std::string too_few = "fewer than " + std::to_string(config.min_sharers) + " sharers";
  for (const uint32_t item : relay.paged) {
    const bool has_prefix = !items[item].prefix.empty();
    results[item].why = !config.enabled ? "disabled" : has_prefix ? too_few : "no prefix";
  }
}

}  // namespace

ModelRunner::ModelRunner(const ModelConfig& config, const EngineOptions& options,
                         std::shared_ptr<const Platform> platform,
                         attention::BackendChoice attn_backend, std::vector<Stage> stages,
                         KvMemory kv)
    : config_(config),
      block_size_(options.block_size),
      platform_(std::move(platform)),
      attn_backend_(std::move(attn_backend)),
      relay_(RelayConfigFor(options.relay, attn_backend_.backend)),
      stages_(std::move(stages)),
      kv_(std::move(kv)) {
  for (const KvRank& rank : kv_.ranks) views_.push_back(ViewOf(rank));
}

// The sample runs on an fp32 cache that is there for as long.
Status ModelRunner::ScaleCaches(const EngineOptions& options) {
  const std::vector<uint32_t> ids = SampleTokens(config_);
  const auto tokens = static_cast<uint32_t>(ids.size());
  EngineOptions wide = options;
  wide.kv_dtype = DType::kFp32;
  wide.kv_cache = KvCacheKind::kPaged;
  wide.kv_blocks = (tokens + block_size_ - 1) / block_size_;
  wide.kv_bytes = 0;
  KVRELAY_ASSIGN_OR_RETURN(KvMemory sample, KvMemory::Allocate(config_, wide, stages_, *platform_));
  KVRELAY_ASSIGN_OR_RETURN(const BlockTable blocks, sample.pool->Allocate(wide.kv_blocks));
  // Shards refer to the views: other values, the same objects.
  std::swap(kv_, sample);
  std::ranges::transform(kv_.ranks, views_.begin(), ViewOf);
  const StepItem item{.token_ids = ids, .blocks = blocks.blocks()};
  if (const auto results = Step({&item, 1}); !results) return results.error();
  std::swap(kv_, sample);
  const std::vector<KvScales> scales =
      MeasureScales(sample.ranks, blocks.blocks(), tokens, *options.kv_dtype, options.kv_scales);
  for (size_t rank = 0; rank < scales.size(); ++rank) kv_.ranks[rank].layout.scales = scales[rank];
  std::ranges::transform(kv_.ranks, views_.begin(), ViewOf);
  return Status::Ok();
}

Result<std::unique_ptr<ModelRunner>> ModelRunner::Create(const ModelConfig& config,
                                                         const Checkpoint& checkpoint,
                                                         const EngineOptions& asked,
                                                         std::shared_ptr<const Platform> platform) {
  KVRELAY_RETURN_IF_ERROR(asked.Validate());
  KVRELAY_RETURN_IF_ERROR(platform->Check(asked));
  EngineOptions options = asked;
  options.kv_dtype = asked.kv_dtype.value_or(platform->dtype());
  KVRELAY_ASSIGN_OR_RETURN(attention::BackendChoice backend,
                           platform->ChooseAttnBackend(config, options));
  KVRELAY_ASSIGN_OR_RETURN(std::vector<Stage> stages,
                           MakeStages(config, options.pp, options.tp, options.pp_layers));
  SetParallelism(options.threads > 0 ? options.threads : AvailableThreads());
  KVRELAY_ASSIGN_OR_RETURN(KvMemory kv, KvMemory::Allocate(config, options, stages, *platform));
  std::unique_ptr<ModelRunner> runner(new ModelRunner(
      config, options, std::move(platform), std::move(backend), std::move(stages), std::move(kv)));
  KVRELAY_ASSIGN_OR_RETURN(
      runner->shards_,
      runner->platform_->Build(config, checkpoint, options, runner->stages_, runner->views_));
  if (WantsScales(options)) KVRELAY_RETURN_IF_ERROR(runner->ScaleCaches(options));
  return runner;
}

Status ModelRunner::Check(const StepItem& item) const {
  const auto bad = [](const std::string& what) {
    return Status(Code::kInvalidArgument, "step: " + what);
  };
  if (item.token_ids.empty()) return bad("an item without tokens");
  for (const uint32_t id : item.token_ids) {
    if (id >= config_.vocab_size) {
      return bad("token id " + std::to_string(id) + " is outside the vocabulary of " +
                 std::to_string(config_.vocab_size));
    }
  }
  const uint64_t end = uint64_t{item.first_position} + item.token_ids.size();
  const uint64_t room = (item.prefix.size() + item.blocks.size()) * uint64_t{block_size_};
  if (item.first_position < item.prefix.size() * uint64_t{block_size_} && !item.prefix.empty()) {
    return bad("position " + std::to_string(item.first_position) + " lies in the shared prefix");
  }
  if (end > room) {
    return bad("position " + std::to_string(end - 1) + " lies behind the " + std::to_string(room) +
               " tokens of the block table");
  }
  const uint32_t ids = kv_.ranks.front().layout.num_blocks;
  for (const std::span<const BlockId> table : {item.prefix, item.blocks}) {
    for (const BlockId block : table) {
      if (block >= ids) return bad("no block " + std::to_string(block));
    }
  }
  return Status::Ok();
}

void ModelRunner::GatherRows(std::span<const StepItem> items) {
  rows_.token_ids.clear();
  rows_.positions.clear();
  rows_.blocks.clear();
  rows_.sequences.clear();
  rows_.logit_rows.clear();
  bool all_logits = false;
  for (const StepItem& item : items) {
    const auto count = static_cast<uint32_t>(item.token_ids.size());
    rows_.sequences.push_back({.first_row = static_cast<uint32_t>(rows_.token_ids.size()),
                               .rows = count,
                               .context = item.first_position + count,
                               .prefix = item.prefix,
                               .blocks = item.blocks});
    rows_.token_ids.insert(rows_.token_ids.end(), item.token_ids.begin(), item.token_ids.end());
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t position = item.first_position + i;
      rows_.positions.push_back(position);
      rows_.blocks.push_back(item.blocks[position / block_size_ - item.prefix.size()]);
    }
    all_logits |= item.want_logits;
    if (item.want_token || item.want_logits) {
      rows_.logit_rows.push_back(static_cast<uint32_t>(rows_.token_ids.size() - 1));
    }
  }
  rows_.likeliest.resize(rows_.logit_rows.size() * tp_size());
  rows_.logits.resize(all_logits ? rows_.logit_rows.size() * config_.vocab_size : 0);
}

void ModelRunner::Report(std::span<const StepItem> items, uint32_t rank, uint32_t layers,
                         uint32_t all_layers) {
  for (const StepItem& item : items) {
    if (item.progress.empty()) continue;
    const auto end = item.first_position + static_cast<uint32_t>(item.token_ids.size());
    const Progress progress =
        layers < all_layers ? Progress{item.first_position, end, layers} : Progress{end, end, 0};
    for (const ProgressFn* fn : item.progress) (*fn)(rank, progress);
  }
}

// Among the ranks' candidates; ranks have ascending ids.
uint32_t ModelRunner::LikeliestOf(size_t logit_row) const {
  ScoredToken best = rows_.likeliest[logit_row];
  for (uint32_t rank = 1; rank < tp_size(); ++rank) {
    const ScoredToken& other = rows_.likeliest[rank * rows_.logit_rows.size() + logit_row];
    const bool only_number = std::isnan(best.logit) && !std::isnan(other.logit);
    if (other.logit > best.logit || only_number) best = other;
  }
  return best.id;
}

Status ModelRunner::RunStages(const StepRows& step, std::span<const StepItem> items) {
  if (stages_.size() > 1) {
    for (auto& edge : rows_.between) edge.resize(step.token_ids.size() * config_.hidden_size);
  }
  const StepLogits logits{.likeliest = rows_.likeliest, .all = rows_.logits};
  const bool reports =
      std::ranges::any_of(items, [](const StepItem& item) { return !item.progress.empty(); });
  for (uint32_t index = 0; index < stages_.size(); ++index) {
    const Stage& stage = stages_[index];
    const StageEdges edges{.in = rows_.between[index % 2], .out = rows_.between[(index + 1) % 2]};
    KVRELAY_RETURN_IF_ERROR(stage.group->Run([&](uint32_t tp_rank) {
      const uint32_t rank = index * tp_size() + tp_rank;
      const auto report = [&](uint32_t layers) { Report(items, rank, layers, stage.layers()); };
      return shards_[rank]->Forward(step, edges, logits,
                                    reports ? ModelShard::LayersWritten(report) : nullptr);
    }));
  }
  return Status::Ok();
}

Result<std::vector<ItemResult>> ModelRunner::Step(std::span<const StepItem> items) {
  for (const StepItem& item : items) KVRELAY_RETURN_IF_ERROR(Check(item));
  std::vector<ItemResult> results(items.size());
  if (items.empty()) return results;
  GatherRows(items);
  KVRELAY_RETURN_IF_ERROR(kv_.Prepare(rows_.blocks, rows_.positions));

  const attention::RelayMetadata relay = attention::PlanRelay(
      {.sequences = rows_.sequences, .query_heads = config_.num_heads / tp_size(), .scale = 1.0F},
      relay_);
  Explain(relay_, relay, items, results);
  const StepRows step = {.token_ids = rows_.token_ids,
                         .positions = rows_.positions,
                         .blocks = rows_.blocks,
                         .sequences = rows_.sequences,
                         .relay = relay.groups.empty() ? nullptr : &relay,
                         .naive = attn_backend_.backend == attention::Backend::kNaive,
                         .logit_rows = rows_.logit_rows};
  KVRELAY_RETURN_IF_ERROR(RunStages(step, items));

  size_t row = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    if (!items[i].want_token && !items[i].want_logits) continue;
    results[i].token = LikeliestOf(row);
    if (items[i].want_logits) {
      results[i].logits = std::span<const float>(rows_.logits)
                              .subspan(row * config_.vocab_size, config_.vocab_size);
    }
    ++row;
  }
  return results;
}

}  // namespace kvrelay::engine
