// What the planner knows of one side: checks of its shard, layout and tables, and its numbers as
// plan_box.h wants them.
#include <algorithm>
#include <cmath>
#include <string>

#include "kvcache/plan_box.h"

namespace kvrelay::internal {
namespace {

Error Bad(std::string_view name, const std::string& what) {
  return Error(Code::kInvalidArgument, std::string(name) + what);
}

std::string RangeText(uint64_t begin, uint64_t end) {
  return std::to_string(begin) + " to " + std::to_string(end);
}

}  // namespace

Status Differ(std::string_view what, std::string_view owner, std::string_view reader) {
  return Error(Code::kIncompatible, "KV caches differ in " + std::string(what) + ": owner has " +
                                        std::string(owner) + ", reader " + std::string(reader));
}

Status CheckSide(std::string_view name, const KvLayout& layout, const KvShard& shard) {
  if (Status status = shard.Validate(); !status.ok()) return status.Wrap(name);
  bool agree = layout.layers() == shard.layer_count &&
               (layout.layer_kinds.empty() || layout.layer_kinds.size() == layout.k.size());
  bool valid = (!layout.has_v() || layout.v.size() == layout.k.size()) && SizeOf(layout.dtype) > 0;
  for (uint32_t i = 0; i < layout.num_kinds(); ++i) {
    const KvKind kind = layout.kind(i);
    agree = agree && kind.head_group < shard.num_head_groups() &&
            kind.kv_heads == shard.heads(kind.head_group).count;
    valid = valid && kind.block_size > 0 && kind.head_dim > 0 &&
            (kind.page_bytes > 0) == layout.opaque();
  }
  if (!agree) {
    return Bad(name,
               "'s layout (" + layout.ToString() + ") and shard (" + shard.ToString() + ") differ");
  }
  for (const uint32_t kind : layout.layer_kinds) valid = valid && kind < layout.num_kinds();
  if (!valid) return Bad(name, "'s layout is not valid: " + layout.ToString());
  return Status::Ok();
}

Status CheckHeads(std::string_view name, const KvShard& shard, uint32_t head_group,
                  uint32_t head_begin, uint32_t head_end) {
  if (head_group < shard.num_head_groups()) {
    const KvHeads heads = shard.heads(head_group);
    if (head_begin < head_end && head_begin >= heads.begin && head_end <= heads.end()) {
      return Status::Ok();
    }
  }
  return Bad("KV heads ", RangeText(head_begin, head_end) +
                              (head_group == 0 ? "" : " of group " + std::to_string(head_group)) +
                              " are not held by " + std::string(name) + " " + shard.ToString());
}

PlanSide StridesOf(const KvLayout& layout, const KvKind& kind) {
  PlanSide side;
  side.block_stride = kind.block_stride;
  side.head_stride = kind.head_stride;
  side.unit_stride = layout.opaque() ? kind.page_bytes : kind.token_stride;
  side.row_bytes =
      layout.opaque() ? kind.page_bytes : uint64_t{kind.head_dim} * SizeOf(layout.dtype);
  side.dtype = layout.dtype;
  side.block_size = layout.opaque() ? 1 : kind.block_size;
  return side;
}

TokenRange UnitsOf(const KvLayout& layout, const KvKind& kind, TokenRange tokens) {
  if (!layout.opaque()) return tokens;
  return {tokens.begin / kind.block_size, (tokens.end + kind.block_size - 1) / kind.block_size};
}

std::vector<CommonLayers> CommonLayersOf(const PullSide& owner, const PullSide& reader) {
  std::vector<CommonLayers> common;
  const uint32_t end = std::min(owner.shard.layer_end(), reader.shard.layer_end());
  for (uint32_t layer = std::max(owner.shard.layer_begin, reader.shard.layer_begin); layer < end;
       ++layer) {
    const uint32_t from = owner.layout.kind_of(layer - owner.shard.layer_begin);
    const uint32_t to = reader.layout.kind_of(layer - reader.shard.layer_begin);
    auto it = std::find_if(common.begin(), common.end(), [&](const CommonLayers& c) {
      return c.owner_kind == from && c.reader_kind == to;
    });
    if (it == common.end()) it = common.insert(it, {from, to, {}});
    it->layers.push_back(layer);
  }
  return common;
}

TokenRange NeededTokens(const PullSide& reader, uint32_t kind_index, TokenRange tokens) {
  const KvKind kind = reader.layout.kind(kind_index);
  if (kind.window == 0) return tokens;
  uint32_t wanted = TableOf(reader, kind_index).held_from;
  if (reader.layout.opaque()) wanted -= wanted % kind.block_size;
  return {std::min(std::max(tokens.begin, wanted), tokens.end), tokens.end};
}

const KvScales& ScalesOf(const PullSide& side) {
  return side.scales != nullptr ? *side.scales : side.layout.scales;
}

Status CheckScalesKnown(std::string_view name, const PullSide& side) {
  if (!side.layout.scales.with_request || side.scales != nullptr) return Status::Ok();
  return Bad(name, "'s scales come with each request, and this one's are not there");
}

const TableView& TableOf(const PullSide& side, uint32_t kind) {
  return kind < side.tables.size() ? side.tables[kind] : side.table;
}

Result<PlanSide> SideOf(std::string_view name, const PullSide& side, uint32_t kind_index,
                        TokenRange tokens) {
  const KvKind kind = side.layout.kind(kind_index);
  const TableView& table = TableOf(side, kind_index);
  const uint64_t block_size = kind.block_size;
  if (table.first_token % block_size != 0) {
    return Bad(name, "'s table starts at token " + std::to_string(table.first_token) +
                         ", no multiple of its block size " + std::to_string(block_size));
  }
  const uint64_t held_from = UnitsOf(side.layout, kind, {table.held_from, 0}).begin *
                             (side.layout.opaque() ? block_size : 1);
  const uint64_t begin = std::max<uint64_t>(table.first_token, held_from);
  const uint64_t end = table.first_token + table.blocks.size() * block_size;
  if (tokens.begin > tokens.end || tokens.begin < begin || tokens.end > end) {
    return Bad(name, "'s table covers tokens " + RangeText(begin, end) + ", needed are " +
                         RangeText(tokens.begin, tokens.end));
  }
  if (side.layout.opaque() && tokens.begin % block_size != 0) {
    return Bad(name, "'s pages are opaque and can not be cut: tokens " +
                         RangeText(tokens.begin, tokens.end) + " begin inside a page of " +
                         std::to_string(block_size));
  }
  PlanSide plan_side = StridesOf(side.layout, kind);
  plan_side.blocks = table.blocks;
  plan_side.first = UnitsOf(side.layout, kind, {table.first_token, table.first_token}).begin;
  const uint64_t first = (tokens.begin - table.first_token) / block_size;
  const uint64_t last = (tokens.end - table.first_token + block_size - 1) / block_size;
  for (uint64_t i = first; i < last && tokens.size() > 0; ++i) {
    if (table.blocks[i] >= kind.num_blocks) {
      return Bad(name, "'s table names block " + std::to_string(table.blocks[i]) + ", it has " +
                           std::to_string(kind.num_blocks));
    }
  }
  return plan_side;
}

SidePlace PlaceOf(const TensorPlace& tensor, const KvKind& kind, uint32_t head) {
  return {tensor.region, tensor.offset + head * kind.head_stride};
}

Status AddFactor(float from, float to, std::vector<float>& factors) {
  const float factor = from / to;
  if (!std::isnormal(factor)) {
    return Differ("scales, too far from each other", std::to_string(from), std::to_string(to));
  }
  factors.push_back(factor);
  return Status::Ok();
}

ScaleOf::ScaleOf(const PullSide& side) : scales_(ScalesOf(side)) {
  if (!scales_.per_head) return;
  uint32_t next = 0;
  for (uint32_t layer = 0; layer < side.layout.layers(); ++layer) {
    first_head_.push_back(next);
    next += side.layout.kind(side.layout.kind_of(layer)).kv_heads;
  }
}

float ScaleOf::operator()(bool is_v, uint32_t layer, uint32_t head) const {
  const std::vector<float>& values = is_v ? scales_.v : scales_.k;
  const size_t index = scales_.per_head ? size_t{first_head_[layer]} + head : layer;
  return index < values.size() ? values[index] : 1.0F;
}

}  // namespace kvrelay::internal
