#include "kvcache/shard.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace kvrelay {
namespace {

// Bounds for what a peer claims to be.
constexpr uint32_t kMaxRanks = 1U << 16;
constexpr uint32_t kMaxLayers = 1U << 16;
constexpr uint32_t kMaxHeads = 1U << 16;

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

// Layers [begin, end) of the model.
struct LayerRange {
  uint64_t begin = 0;
  uint64_t end = 0;
  bool operator==(const LayerRange&) const = default;
};

LayerRange Layers(const KvShard& shard) {
  return {shard.layer_begin, uint64_t{shard.layer_begin} + shard.layer_count};
}

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
  uint64_t next = need.begin;
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

}  // namespace

Result<KvShard> KvShard::Make(uint32_t total_layers, uint32_t total_heads, uint32_t tp_size,
                              uint32_t tp_rank) {
  if (tp_size == 0 || total_heads == 0 ||
      (total_heads % tp_size != 0 && tp_size % total_heads != 0)) {
    return Error(Code::kInvalidArgument, "tensor parallel size " + std::to_string(tp_size) +
                                             " and " + std::to_string(total_heads) +
                                             " KV heads: one must be a multiple of the other");
  }
  KvShard shard;
  shard.tp_rank = tp_rank;
  shard.tp_size = tp_size;
  shard.total_layers = total_layers;
  shard.layer_count = total_layers;
  shard.total_heads = total_heads;
  if (total_heads >= tp_size) {
    shard.head_count = total_heads / tp_size;
    shard.head_begin = tp_rank * shard.head_count;
  } else {
    shard.head_count = 1;
    shard.head_begin = tp_rank / (tp_size / total_heads);
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
  KVRELAY_RETURN_IF_ERROR(CheckPart("layers", layer_begin, layer_count, total_layers, kMaxLayers));
  return CheckPart("heads", head_begin, head_count, total_heads, kMaxHeads);
}

std::string KvShard::ToString() const {
  return "rank " + std::to_string(tp_rank) + " of " + std::to_string(tp_size) + ": " +
         PartName("layer", layer_begin, layer_count, total_layers) + ", " +
         PartName("head", head_begin, head_count, total_heads);
}

Result<std::vector<PullSource>> AssignSources(const KvShard& reader,
                                              std::span<const KvShard> owners) {
  KVRELAY_RETURN_IF_ERROR(reader.Validate());
  for (const KvShard& owner : owners) {
    KVRELAY_RETURN_IF_ERROR(owner.Validate());
    if (owner.total_layers != reader.total_layers || owner.total_heads != reader.total_heads) {
      return Error(Code::kIncompatible,
                   "models differ: owner " + owner.ToString() + ", reader " + reader.ToString());
    }
  }
  KVRELAY_ASSIGN_OR_RETURN(const std::vector<LayerRange> stages, Stages(reader, owners));
  std::vector<PullSource> sources;
  for (const LayerRange& stage : stages) {
    const size_t stage_begin = sources.size();
    for (uint32_t head = reader.head_begin; head < reader.head_end(); ++head) {
      std::vector<uint32_t> holders;
      for (uint32_t i = 0; i < owners.size(); ++i) {
        const KvShard& owner = owners[i];
        if (Layers(owner) == stage && head >= owner.head_begin && head < owner.head_end()) {
          holders.push_back(i);
        }
      }
      if (holders.empty()) {
        return Error(Code::kIncompatible,
                     "no owner rank holds KV head " + std::to_string(head) + " of layers " +
                         std::to_string(stage.begin) + "-" + std::to_string(stage.end - 1) +
                         ": reader " + reader.ToString() + ", owners: " + OwnersText(owners));
      }
      // Reader ranks that need the same head have consecutive numbers, so that they take the
      // replicas in turn.
      const uint32_t owner = holders[reader.tp_rank % holders.size()];
      const bool extends = sources.size() > stage_begin && sources.back().owner == owner &&
                           sources.back().head_end == head;
      if (extends) {
        sources.back().head_end = head + 1;
      } else {
        sources.push_back({owner, head, head + 1});
      }
    }
  }
  return sources;
}

}  // namespace kvrelay
