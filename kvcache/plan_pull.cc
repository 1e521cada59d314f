#include "kvcache/plan_pull.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

#include "kvcache/plan_box.h"
#include "kvcache/stream_chunks.h"

namespace kvrelay {
namespace {

using internal::Differ;

Status CheckSame(std::string_view what, uint64_t owner, uint64_t reader) {
  if (owner == reader) return Status::Ok();
  return Differ(what, std::to_string(owner), std::to_string(reader));
}

std::string WindowText(uint32_t window) {
  return window == 0 ? "all tokens" : "a window of " + std::to_string(window);
}

// Layers of these kinds, one on each side, that are the same layers of the model.
Status CheckKinds(const KvKind& owner, const KvKind& reader, bool opaque) {
  KVRELAY_RETURN_IF_ERROR(CheckSame("head group", owner.head_group, reader.head_group));
  KVRELAY_RETURN_IF_ERROR(CheckSame("head dim", owner.head_dim, reader.head_dim));
  if (owner.window > 0 && (reader.window == 0 || reader.window > owner.window)) {
    return Differ("what they keep of a request", WindowText(owner.window),
                  WindowText(reader.window));
  }
  if (!opaque) return Status::Ok();
  if (owner.block_size != reader.block_size || owner.page_bytes != reader.page_bytes) {
    const auto text = [](const KvKind& kind) {
      return std::to_string(kind.block_size) + " tokens in " + std::to_string(kind.page_bytes) +
             " bytes";
    };
    return Differ("opaque pages, which can not be cut", text(owner), text(reader));
  }
  return Status::Ok();
}

Status CheckFormats(const KvLayout& owner, const KvLayout& reader) {
  const auto text = [](const KvLayout& layout) {
    std::string name(KvFormatName(layout.format));
    if (layout.opaque()) {
      name += " \"" + layout.page_name + "\" of " + std::string(DTypeName(layout.dtype));
    }
    return name;
  };
  const bool opaque = owner.opaque() || reader.opaque();
  if (owner.has_v() != reader.has_v() || owner.opaque() != reader.opaque() ||
      (opaque && (owner.page_name != reader.page_name || owner.dtype != reader.dtype))) {
    return Differ(opaque ? "format, and opaque pages can not be converted" : "format", text(owner),
                  text(reader));
  }
  if (opaque && owner.scales != reader.scales) {
    return Differ("scales, and opaque pages can not be converted",
                  owner.scales.empty() ? "none" : "some of its own",
                  reader.scales.empty() ? "none" : "some of its own");
  }
  return Status::Ok();
}

// A reader takes scales that come with a request as they are, together with the numbers.
Status CheckScaled(const KvLayout& owner, const KvLayout& reader) {
  if (!reader.scales.with_request) return Status::Ok();
  if (owner.dtype != reader.dtype) {
    return Differ("dtype, and a reader whose scales come with the request converts nothing",
                  DTypeName(owner.dtype), DTypeName(reader.dtype));
  }
  if (owner.scales.per_head && !reader.scales.per_head) {
    return Differ("scales, which come with the request", "per head", "per tensor");
  }
  return Status::Ok();
}

Status CheckLayers(const PullSide& owner, const PullSide& reader) {
  KVRELAY_RETURN_IF_ERROR(
      CheckSame("layers of the model", owner.shard.total_layers, reader.shard.total_layers));
  KVRELAY_RETURN_IF_ERROR(
      CheckSame("head groups", owner.shard.num_head_groups(), reader.shard.num_head_groups()));
  for (uint32_t group = 0; group < owner.shard.num_head_groups(); ++group) {
    KVRELAY_RETURN_IF_ERROR(CheckSame("KV heads of the model", owner.shard.heads(group).total,
                                      reader.shard.heads(group).total));
  }
  for (const internal::CommonLayers& common : internal::CommonLayersOf(owner, reader)) {
    KVRELAY_RETURN_IF_ERROR(CheckKinds(owner.layout.kind(common.owner_kind),
                                       reader.layout.kind(common.reader_kind),
                                       owner.layout.opaque()));
  }
  return Status::Ok();
}

// One pull, as far as it is the same for all kinds of layers.
struct Pull {
  const PullSide& owner;
  const PullSide& reader;
  uint32_t head_begin;
  uint32_t heads;
  internal::ScaleOf owner_scale{owner};
  internal::ScaleOf reader_scale{reader};

  bool has_factors = !owner.layout.opaque() &&
                     (owner.layout.dtype != reader.layout.dtype ||
                      !internal::ScalesOf(owner).empty() || !internal::ScalesOf(reader).empty());
};

Status AddTensors(const Pull& pull, const std::vector<uint32_t>& layers, const KvKind& from_kind,
                  const KvKind& to_kind, internal::TensorSet& set) {
  const PullSide& owner = pull.owner;
  const PullSide& reader = pull.reader;
  const uint32_t from_head = pull.head_begin - owner.shard.heads(from_kind.head_group).begin;
  const uint32_t to_head = pull.head_begin - reader.shard.heads(to_kind.head_group).begin;
  set.heads = pull.heads;
  set.per_layer = owner.layout.has_v() ? 2 : 1;
  set.places.reserve(layers.size() * set.per_layer);
  for (const uint32_t layer : layers) {
    const uint32_t from = layer - owner.shard.layer_begin;
    const uint32_t to = layer - reader.shard.layer_begin;
    for (const bool is_v : {false, true}) {
      if (is_v && !owner.layout.has_v()) continue;
      const internal::SidePlace a = internal::PlaceOf(
          is_v ? owner.layout.v[from] : owner.layout.k[from], from_kind, from_head);
      const internal::SidePlace b =
          internal::PlaceOf(is_v ? reader.layout.v[to] : reader.layout.k[to], to_kind, to_head);
      set.places.push_back({a.region, b.region, a.offset, b.offset});
      if (!pull.has_factors) continue;
      for (uint32_t head = 0; head < pull.heads; ++head) {
        KVRELAY_RETURN_IF_ERROR(internal::AddFactor(pull.owner_scale(is_v, from, from_head + head),
                                                    pull.reader_scale(is_v, to, to_head + head),
                                                    set.factors));
      }
    }
  }
  return Status::Ok();
}

// All that a pull needs whatever its tokens.
Status CheckPull(const PullSide& owner, const PullSide& reader, uint32_t head_begin,
                 uint32_t head_end, uint32_t head_group) {
  KVRELAY_RETURN_IF_ERROR(CheckServable(owner.layout, owner.shard, reader.layout, reader.shard));
  KVRELAY_RETURN_IF_ERROR(
      internal::CheckHeads("owner", owner.shard, head_group, head_begin, head_end));
  KVRELAY_RETURN_IF_ERROR(
      internal::CheckHeads("reader", reader.shard, head_group, head_begin, head_end));
  KVRELAY_RETURN_IF_ERROR(internal::CheckScalesKnown("owner", owner));
  KVRELAY_RETURN_IF_ERROR(internal::CheckScalesKnown("reader", reader));
  if (!internal::CommonLayersOf(owner, reader).empty()) return Status::Ok();
  return Differ("layers, none is held by both", owner.shard.ToString(), reader.shard.ToString());
}

}  // namespace

Status CheckServable(const KvLayout& owner, const KvShard& owner_shard, const KvLayout& reader,
                     const KvShard& reader_shard) {
  KVRELAY_RETURN_IF_ERROR(internal::CheckSide("owner", owner, owner_shard));
  KVRELAY_RETURN_IF_ERROR(internal::CheckSide("reader", reader, reader_shard));
  KVRELAY_RETURN_IF_ERROR(CheckFormats(owner, reader));
  KVRELAY_RETURN_IF_ERROR(CheckScaled(owner, reader));
  return CheckLayers({owner, owner_shard, {}}, {reader, reader_shard, {}});
}

Status CheckTables(std::string_view name, const PullSide& side, TokenRange tokens) {
  for (uint32_t index = 0; index < side.layout.num_kinds(); ++index) {
    const KvKind kind = side.layout.kind(index);
    TokenRange held = tokens;
    if (kind.window > 0) {
      held.begin = std::clamp(internal::TableOf(side, index).held_from, held.begin, held.end);
    }
    if (side.layout.opaque()) held.begin -= held.begin % kind.block_size;  // pages are not cut
    const auto found = internal::SideOf(name, side, index, held);
    if (!found.has_value()) return found.error();
  }
  return Status::Ok();
}

Result<CopyPlan> PlanPull(const PullSide& owner, const PullSide& reader, uint32_t head_begin,
                          uint32_t head_end, TokenRange tokens, uint32_t head_group,
                          LayerRange layers) {
  KVRELAY_RETURN_IF_ERROR(CheckPull(owner, reader, head_begin, head_end, head_group));
  const Pull pull{owner, reader, head_begin, head_end - head_begin};
  CopyPlan plan;
  for (internal::CommonLayers& common : internal::CommonLayersOf(owner, reader)) {
    std::erase_if(common.layers,
                  [&](uint32_t layer) { return layer < layers.begin || layer >= layers.end; });
    if (common.layers.empty()) continue;
    const KvKind from = owner.layout.kind(common.owner_kind);
    const KvKind to = reader.layout.kind(common.reader_kind);
    if (from.head_group != head_group) continue;
    const TokenRange needed = internal::NeededTokens(reader, common.reader_kind, tokens);
    if (needed.size() == 0) continue;
    KVRELAY_ASSIGN_OR_RETURN(const internal::PlanSide src,
                             internal::SideOf("owner", owner, common.owner_kind, needed));
    KVRELAY_ASSIGN_OR_RETURN(const internal::PlanSide dst,
                             internal::SideOf("reader", reader, common.reader_kind, needed));
    internal::TensorSet set;
    KVRELAY_RETURN_IF_ERROR(AddTensors(pull, common.layers, from, to, set));
    const auto groups =
        internal::AppendSegments(plan, src, dst, internal::UnitsOf(owner.layout, from, needed));
    internal::AppendBoxes(plan, src, dst, groups, std::move(set));
  }
  return plan;
}

Result<std::vector<StreamShape>> StreamsOf(const PullSide& owner, const PullSide& reader,
                                           const PullSource& source, TokenRange tokens) {
  KVRELAY_RETURN_IF_ERROR(
      CheckPull(owner, reader, source.head_begin, source.head_end, source.head_group));
  const bool scaled = !internal::ScalesOf(owner).empty() || !internal::ScalesOf(reader).empty();
  const bool readers = !scaled && SizeOf(reader.layout.dtype) < SizeOf(owner.layout.dtype);
  std::vector<StreamShape> shapes;
  for (const internal::CommonLayers& common : internal::CommonLayersOf(owner, reader)) {
    const KvKind kind = owner.layout.kind(common.owner_kind);
    if (kind.head_group != source.head_group) continue;
    const TokenRange needed = internal::NeededTokens(reader, common.reader_kind, tokens);
    if (needed.size() == 0) continue;
    for (const bool is_owner : {true, false}) {
      const auto side = is_owner ? internal::SideOf("owner", owner, common.owner_kind, needed)
                                 : internal::SideOf("reader", reader, common.reader_kind, needed);
      if (!side.has_value()) return Error(side.error());
    }
    shapes.push_back({.layers = common.layers,
                      .head_group = source.head_group,
                      .head_begin = source.head_begin,
                      .head_end = source.head_end,
                      .tokens = needed,
                      .dtype = readers ? reader.layout.dtype : owner.layout.dtype,
                      .head_dim = kind.head_dim,
                      .has_v = owner.layout.has_v(),
                      .page_tokens = owner.layout.opaque() ? kind.block_size : 0,
                      .page_bytes = kind.page_bytes});
  }
  return shapes;
}

}  // namespace kvrelay
