#include "kvcache/shard.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace kvrelay {
namespace {

// Bounds for what a peer claims to be.
constexpr uint32_t kMaxRanks = 1U << 16;
constexpr uint32_t kMaxModelLayers = 1U << 16;
constexpr uint32_t kMaxModelHeads = 1U << 16;
constexpr uint32_t kMaxHeadGroups = 16;

Status CheckPart(std::string_view what, uint32_t begin, uint32_t count, uint32_t total,
                 uint32_t max) {
  if (total <= max && count >= 1 && begin < total && count <= total - begin) return Status::Ok();
  return Error(Code::kInvalidArgument, "KV shard: " + std::to_string(count) + " " +
                                           std::string(what) + " from " + std::to_string(begin) +
                                           " of " + std::to_string(total) + " (at most " +
                                           std::to_string(max) + ")");
}

// "layers 0-5 of 6", "head 2 of 4"
std::string PartName(std::string_view what, uint64_t begin, uint64_t count, uint64_t total) {
  std::string name = std::string(what) + (count == 1 ? " " : "s ") + std::to_string(begin);
  if (count != 1) name += "-" + std::to_string(begin + count - 1);
  return name + " of " + std::to_string(total);
}

LayerRange Layers(const KvShard& shard) { return {shard.layer_begin, shard.layer_end()}; }

std::string OwnersText(std::span<const KvShard> owners) {
  std::string text;
  for (const KvShard& owner : owners.first(std::min<size_t>(owners.size(), 8))) {
    text += (text.empty() ? "" : "; ") + owner.ToString();
  }
  if (owners.size() > 8) text += "; ... (" + std::to_string(owners.size()) + ")";
  return text.empty() ? "none" : text;
}

// The owners' pipeline stages that hold any of the reader's layers, in order. A source names heads
// only, so that each of these layers must be in exactly one stage.
Result<std::vector<LayerRange>> Stages(const KvShard& reader, std::span<const KvShard> owners) {
  const LayerRange need = Layers(reader);
  std::vector<LayerRange> stages;
  for (const KvShard& owner : owners) {
    const LayerRange has = Layers(owner);
    if (has.begin < need.end && need.begin < has.end) stages.push_back(has);
  }
  std::sort(stages.begin(), stages.end(), [](const LayerRange& a, const LayerRange& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  stages.erase(std::unique(stages.begin(), stages.end()), stages.end());
  uint32_t next = need.begin;
  for (const LayerRange& stage : stages) {
    const bool follows = &stage == stages.data() ? stage.begin <= next : stage.begin == next;
    if (!follows) break;
    next = stage.end;
    if (&stage == &stages.back() && next >= need.end) return stages;
  }
  return Error(Code::kIncompatible,
               "the owner ranks' layers do not cover the reader's once each: "
               "reader " +
                   reader.ToString() + ", owners: " + OwnersText(owners));
}

// One head group of one stage. Reader ranks that need the same head have consecutive numbers, so
// that they take the replicas in turn.
Status AssignHeads(const KvShard& reader, std::span<const KvShard> owners, const LayerRange& stage,
                   uint32_t group, std::vector<PullSource>& sources) {
  const size_t first = sources.size();
  const KvHeads need = reader.heads(group);
  for (uint32_t head = need.begin; head < need.end(); ++head) {
    std::vector<uint32_t> holders;
    for (uint32_t i = 0; i < owners.size(); ++i) {
      const KvHeads has = owners[i].heads(group);
      if (Layers(owners[i]) == stage && head >= has.begin && head < has.end()) holders.push_back(i);
    }
    if (holders.empty()) {
      return Error(Code::kIncompatible, "no owner rank holds KV head " + std::to_string(head) +
                                            " of layers " + std::to_string(stage.begin) + "-" +
                                            std::to_string(stage.end - 1) + ": reader " +
                                            reader.ToString() + ", owners: " + OwnersText(owners));
    }
    const uint32_t owner = holders[reader.tp_rank % holders.size()];
    const bool extends =
        sources.size() > first && sources.back().owner == owner && sources.back().head_end == head;
    if (extends) {
      sources.back().head_end = head + 1;
    } else {
      sources.push_back({owner, head, head + 1, group});
    }
  }
  return Status::Ok();
}

}  // namespace

KvHeads KvHeads::Split(uint32_t total, uint32_t tp_size, uint32_t tp_rank) {
  const auto at = [&](uint32_t rank) {
    return static_cast<uint32_t>(uint64_t{rank} * total / tp_size);
  };
  const uint32_t begin = at(tp_rank);
  return {total, begin, std::max(1U, at(tp_rank + 1) - begin)};
}

Result<KvShard> KvShard::Make(uint32_t total_layers, uint32_t total_heads, uint32_t tp_size,
                              uint32_t tp_rank) {
  KvShard shard;
  shard.tp_rank = tp_rank;
  shard.tp_size = tp_size;
  shard.total_layers = total_layers;
  shard.layer_count = total_layers;
  shard.total_heads = total_heads;
  if (tp_size > 0 && tp_rank < tp_size) {
    const KvHeads heads = KvHeads::Split(total_heads, tp_size, tp_rank);
    shard.head_begin = heads.begin;
    shard.head_count = heads.count;
  }
  KVRELAY_RETURN_IF_ERROR(shard.Validate());
  return shard;
}

Status KvShard::Validate() const {
  if (tp_size == 0 || tp_size > kMaxRanks || tp_rank >= tp_size) {
    return Error(Code::kInvalidArgument, "KV shard: rank " + std::to_string(tp_rank) + " of " +
                                             std::to_string(tp_size) + " (at most " +
                                             std::to_string(kMaxRanks) + " ranks)");
  }
  KVRELAY_RETURN_IF_ERROR(
      CheckPart("layers", layer_begin, layer_count, total_layers, kMaxModelLayers));
  if (num_head_groups() > kMaxHeadGroups) {
    return Error(Code::kInvalidArgument, "KV shard: " + std::to_string(num_head_groups()) +
                                             " head groups (at most " +
                                             std::to_string(kMaxHeadGroups) + ")");
  }
  for (uint32_t group = 0; group < num_head_groups(); ++group) {
    const KvHeads own = heads(group);
    KVRELAY_RETURN_IF_ERROR(CheckPart("heads", own.begin, own.count, own.total, kMaxModelHeads));
  }
  return Status::Ok();
}

std::string KvShard::ToString() const {
  std::string text = "rank " + std::to_string(tp_rank) + " of " + std::to_string(tp_size) + ": " +
                     PartName("layer", layer_begin, layer_count, total_layers);
  for (uint32_t group = 0; group < num_head_groups(); ++group) {
    const KvHeads own = heads(group);
    text += (group == 0 ? ", " : " + ") + PartName("head", own.begin, own.count, own.total);
  }
  return text;
}

Result<std::vector<PullSource>> AssignSources(const KvShard& reader,
                                              std::span<const KvShard> owners) {
  KVRELAY_RETURN_IF_ERROR(reader.Validate());
  for (const KvShard& owner : owners) {
    KVRELAY_RETURN_IF_ERROR(owner.Validate());
    bool same = owner.total_layers == reader.total_layers &&
                owner.num_head_groups() == reader.num_head_groups();
    for (uint32_t group = 0; same && group < reader.num_head_groups(); ++group) {
      same = owner.heads(group).total == reader.heads(group).total;
    }
    if (!same) {
      return Error(Code::kIncompatible,
                   "models differ: owner " + owner.ToString() + ", reader " + reader.ToString());
    }
  }
  KVRELAY_ASSIGN_OR_RETURN(const std::vector<LayerRange> stages, Stages(reader, owners));
  std::vector<PullSource> sources;
  for (const LayerRange& stage : stages) {
    for (uint32_t group = 0; group < reader.num_head_groups(); ++group) {
      KVRELAY_RETURN_IF_ERROR(AssignHeads(reader, owners, stage, group, sources));
    }
  }
  return sources;
}

}  // namespace kvrelay
