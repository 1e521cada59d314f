#include "tools/kvrelay/bench/layout_pulls.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "kvcache/convert.h"
#include "kvcache/plan_pull.h"

namespace kvrelay::tools {
namespace {

constexpr uint32_t kLayers = 16;
constexpr uint32_t kHeads = 8;
constexpr uint32_t kHeadDim = 128;
constexpr uint32_t kBlock = 16;
constexpr uint32_t kWideBlock = 128;

// One cache at some place of its side's memory.
struct Cache {
  KvLayout layout;
  KvShard shard;
  std::vector<BlockId> blocks;
};

// `offset`: of the cache in region 0.
Result<Cache> MakeCache(KvFormat format, DType dtype, uint32_t block, uint32_t tokens, uint32_t tp,
                        uint32_t rank, uint64_t offset, uint64_t seed) {
  Cache cache;
  KVRELAY_ASSIGN_OR_RETURN(cache.shard, KvShard::Make(kLayers, kHeads, tp, rank));
  const uint32_t used = tokens / block;
  const uint32_t all = used + used / 2;  // half as many again lie between them
  cache.layout =
      KvLayout::Dense(format, dtype, kLayers, cache.shard.head_count, kHeadDim, block, all);
  for (auto* places : {&cache.layout.k, &cache.layout.v}) {
    for (TensorPlace& place : *places) place.offset += offset;
  }
  cache.blocks.resize(all);
  std::iota(cache.blocks.begin(), cache.blocks.end(), 0);
  std::shuffle(cache.blocks.begin(), cache.blocks.end(), std::mt19937_64(seed));
  cache.blocks.resize(used);
  return cache;
}

Status Add(const std::string& name, const std::vector<Cache>& owners, const Cache& reader,
           uint32_t tokens, std::vector<LayoutPull>& out) {
  LayoutPull pull;
  pull.name = name;
  for (const Cache& owner : owners) {
    KVRELAY_ASSIGN_OR_RETURN(CopyPlan plan,
                             PlanPull({owner.layout, owner.shard, {owner.blocks}},
                                      {reader.layout, reader.shard, {reader.blocks}},
                                      owner.shard.head_begin, owner.shard.head_end(), {0, tokens}));
    pull.read_bytes += plan.src_bytes();
    pull.slices += plan.slices();
    pull.plans.push_back(std::move(plan));
  }
  out.push_back(std::move(pull));
  return {};
}

}  // namespace

Result<std::vector<LayoutPull>> MakeLayoutPulls(uint64_t memory_bytes) {
  const uint64_t token_bytes = uint64_t{kLayers} * 2 * kHeads * kHeadDim * 2;
  const auto tokens =
      static_cast<uint32_t>(memory_bytes / 2 / token_bytes / kWideBlock * kWideBlock);
  if (tokens == 0) {
    return Error(Code::kInvalidArgument,
                 std::to_string(kWideBlock) + " tokens of " + std::to_string(token_bytes) +
                     " bytes do not fit into half of " + std::to_string(memory_bytes) + " bytes");
  }
  const auto make = [&](KvFormat format, DType dtype, uint32_t block, uint64_t seed) {
    return MakeCache(format, dtype, block, tokens, 1, 0, 0, seed);
  };
  KVRELAY_ASSIGN_OR_RETURN(const Cache owner, make(KvFormat::kNhd, DType::kBf16, kBlock, 1));
  KVRELAY_ASSIGN_OR_RETURN(const Cache reader, make(KvFormat::kNhd, DType::kBf16, kBlock, 2));
  KVRELAY_ASSIGN_OR_RETURN(const Cache hnd, make(KvFormat::kHnd, DType::kBf16, kBlock, 3));
  KVRELAY_ASSIGN_OR_RETURN(const Cache fp8, make(KvFormat::kNhd, DType::kFp8E4m3, kBlock, 4));
  KVRELAY_ASSIGN_OR_RETURN(const Cache wide, make(KvFormat::kNhd, DType::kBf16, kWideBlock, 5));
  std::vector<Cache> ranks;
  uint64_t offset = 0;
  for (uint32_t rank = 0; rank < 4; ++rank) {
    KVRELAY_ASSIGN_OR_RETURN(
        Cache cache, MakeCache(KvFormat::kNhd, DType::kBf16, kBlock, tokens, 4, rank, offset, 6));
    offset += cache.layout.dense_bytes();
    ranks.push_back(std::move(cache));
  }
  std::vector<LayoutPull> pulls;
  KVRELAY_RETURN_IF_ERROR(Add("equal", {owner}, reader, tokens, pulls));
  KVRELAY_RETURN_IF_ERROR(Add("TP4 to TP1", ranks, reader, tokens, pulls));
  KVRELAY_RETURN_IF_ERROR(Add("HND to NHD", {hnd}, reader, tokens, pulls));
  KVRELAY_RETURN_IF_ERROR(Add("bf16 to fp8_e4m3", {owner}, fp8, tokens, pulls));
  KVRELAY_RETURN_IF_ERROR(Add("blocks of 16 to 128", {owner}, wide, tokens, pulls));
  return pulls;
}

bool HoldsLayoutPull(const LayoutPull& pull, uint64_t memory_bytes,
                     std::span<const std::byte> memory) {
  std::vector<std::byte> pattern(memory_bytes);
  FillPattern(pattern);
  bool holds = true;
  for (const CopyPlan& plan : pull.plans) {
    ForEachRun(plan, [&](const CopyBox& box, const PlanRun& run) {
      const std::byte* const from = pattern.data() + run.src;
      const std::byte* const to = memory.data() + run.dst;
      if (!box.casts) {
        holds = holds && std::memcmp(from, to, box.run_bytes) == 0;
        return;
      }
      std::vector<std::byte> cast(box.run_bytes);
      ConvertRun(box.cast.from, from, box.cast.to, cast.data(), box.run_bytes / SizeOf(box.cast.to),
                 run.factor);
      holds = holds && std::memcmp(cast.data(), to, box.run_bytes) == 0;
    });
  }
  return holds;
}

}  // namespace kvrelay::tools
