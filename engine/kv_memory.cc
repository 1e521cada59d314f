#include "engine/kv_memory.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kvcache/sparse_memory.h"
#include "kvcache/virtual_blocks.h"

namespace kvrelay::engine {
namespace {

std::string RankName(size_t rank) { return "kvrelay-kv-" + std::to_string(rank); }

// A latent row is the same in either layout.
KvFormat FormatFor(const ModelConfig& config, const EngineOptions& options) {
  return config.mla ? KvFormat::kMla : options.kv_layout;
}

// How the ranks' blocks look when they are all there from the start.
KvLayout DenseLayout(const ModelConfig& config, const EngineOptions& options, const KvShard& shard,
                     uint32_t num_blocks) {
  return KvLayout::Dense(FormatFor(config, options), options.kv_dtype.value_or(DType::kFp32),
                         shard.layer_count, shard.head_count, config.head_dim, options.block_size,
                         num_blocks);
}

// Rows for all that may hold one at a time: of each request its own tokens and a prefix that is not
// in the store yet, cached prefixes, and what leases keep of requests that are over. More would
// only take addresses; each has at least a page.
uint32_t RowsFor(const EngineOptions& options, uint64_t pages) {
  const uint64_t most = uint64_t{4} * options.max_batch + options.max_cached_system_prompts;
  return static_cast<uint32_t>(std::max<uint64_t>(2, std::min(most, pages)));
}

Status AllocatePaged(const ModelConfig& config, const EngineOptions& options,
                     const std::vector<KvShard>& shards, const Platform& platform,
                     uint64_t num_blocks, KvMemory& to) {
  for (const KvShard& shard : shards) {
    std::shared_ptr<Device> device = platform.device(static_cast<uint32_t>(to.ranks.size()));
    KvLayout layout = DenseLayout(config, options, shard, static_cast<uint32_t>(num_blocks));
    const std::string name = RankName(to.ranks.size());
    Result<Region> region = device ? device->Allocate(layout.dense_bytes(), name)
                                   : Region::AllocateHost(layout.dense_bytes(), name);
    if (!region) {
      return region.error().Wrap("the cache of " + std::to_string(num_blocks) + " blocks (" +
                                 std::to_string(to.bytes) + " bytes on all ranks), rank " +
                                 std::to_string(to.ranks.size()));
    }
    to.ranks.push_back({std::move(region).value(), std::move(layout), shard, std::move(device)});
  }
  to.pool = BlockPool::Create(static_cast<uint32_t>(num_blocks));
  return Status::Ok();
}

Status AllocateVirtual(const ModelConfig& config, const EngineOptions& options,
                       const std::vector<KvShard>& shards, KvMemory& to) {
  const uint32_t block_size = options.block_size;
  std::vector<VirtualKvShape> shapes;
  for (const KvShard& shard : shards) {
    shapes.push_back(
        {.num_layers = shard.layer_count,
         .num_kv_heads = shard.head_count,
         .head_size = config.head_dim,
         .max_batch_size = RowsFor(options, to.bytes / shards.size() / options.kv_page_bytes),
         .max_seq_len = (config.max_position + block_size - 1) / block_size * block_size,
         .dtype = options.kv_dtype.value_or(DType::kFp32),
         .page_size = options.kv_page_bytes,
         .block_size = block_size,
         .megacache = options.kv_layout == KvFormat::kNhd,
         .format = FormatFor(config, options)});
  }
  KVRELAY_ASSIGN_OR_RETURN(const std::vector<VirtualLayout> layouts, VirtualLayout::Make(shapes));
  std::vector<VirtualKvCache::Rank> ranks;
  for (size_t rank = 0; rank < layouts.size(); ++rank) {
    const VirtualLayout& layout = layouts[rank];
    KVRELAY_ASSIGN_OR_RETURN(
        std::shared_ptr<SparseMemory> memory,
        SparseMemory::Create(layout.bytes(), layout.page_bytes, RankName(rank)));
    KVRELAY_ASSIGN_OR_RETURN(Region region, memory->AsRegion(layout.bytes()));
    to.ranks.push_back({std::move(region), layout.kv, shards[rank]});
    ranks.push_back({layout, std::move(memory)});
  }
  KVRELAY_ASSIGN_OR_RETURN(to.pages, VirtualKvCache::Create(std::move(ranks)));
  KVRELAY_RETURN_IF_ERROR(to.pages->ReservePhysicalPages(to.bytes));
  to.pool = BlockPool::Create(std::make_unique<VirtualBlocks>(to.pages));
  if (to.pool->num_blocks() == 0) {
    return {Code::kInvalidArgument, "kv_blocks: " + std::to_string(to.bytes) +
                                        " bytes in pages of " +
                                        std::to_string(options.kv_page_bytes) + " hold no block"};
  }
  return Status::Ok();
}

}  // namespace

Result<KvMemory> KvMemory::Allocate(const ModelConfig& config, const EngineOptions& options,
                                    const std::vector<Stage>& stages, const Platform& platform) {
  std::vector<KvShard> shards;
  uint64_t bytes_per_block = 0;
  for (const Stage& stage : stages) {
    for (uint32_t tp_rank = 0; tp_rank < stage.group->size(); ++tp_rank) {
      KVRELAY_ASSIGN_OR_RETURN(KvShard shard, ShardOf(config, stage, tp_rank));
      bytes_per_block += DenseLayout(config, options, shard, 1).dense_bytes();
      shards.push_back(std::move(shard));
    }
  }
  uint64_t num_blocks = options.kv_blocks;
  if (options.kv_bytes > 0) {
    num_blocks = std::min<uint64_t>(options.kv_bytes / bytes_per_block, 1U << 24);
    if (num_blocks == 0) {
      return Error(Code::kInvalidArgument, "kv_blocks = " + std::to_string(options.kv_bytes) +
                                               " bytes hold no block; one has " +
                                               std::to_string(bytes_per_block) +
                                               " bytes on all ranks");
    }
  }
  KvMemory memory;
  memory.bytes = num_blocks * bytes_per_block;
  KVRELAY_RETURN_IF_ERROR(
      options.kv_cache == KvCacheKind::kVirtual
          ? AllocateVirtual(config, options, shards, memory)
          : AllocatePaged(config, options, shards, platform, num_blocks, memory));
  return memory;
}

Status KvMemory::Prepare(std::span<const BlockId> blocks,
                         std::span<const uint32_t> positions) const {
  if (pages == nullptr) return Status::Ok();
  const VirtualLayout& layout = pages->layout();
  std::vector<uint32_t> seq_lens(layout.rows);
  for (size_t i = 0; i < blocks.size(); ++i) {
    uint32_t& tokens = seq_lens[blocks[i] / layout.row_blocks];
    const uint32_t before = blocks[i] % layout.row_blocks * layout.kv.block_size;
    tokens = std::max(tokens, before + positions[i] % layout.kv.block_size + 1);
  }
  return pages->StepAsync(seq_lens);
}

}  // namespace kvrelay::engine
