#include <algorithm>
#include <string>
#include <string_view>

#include "kvcache/copy_plan.h"
#include "kvcache/plan_box.h"

namespace kvrelay {
namespace {

Status Differ(std::string_view what, std::string_view owner, std::string_view reader) {
  return Error(Code::kIncompatible, "KV caches differ in " + std::string(what) + ": owner has " +
                                        std::string(owner) + ", reader " + std::string(reader));
}

Status CheckSame(std::string_view what, uint64_t owner, uint64_t reader) {
  if (owner == reader) return Status::Ok();
  return Differ(what, std::to_string(owner), std::to_string(reader));
}

Status CheckCompatible(const PullSide& owner, const PullSide& reader) {
  if (owner.layout.dtype != reader.layout.dtype) {
    return Differ("dtype", DTypeName(owner.layout.dtype), DTypeName(reader.layout.dtype));
  }
  if (owner.layout.has_v() != reader.layout.has_v()) {
    return Differ("format", KvFormatName(owner.layout.format), KvFormatName(reader.layout.format));
  }
  KVRELAY_RETURN_IF_ERROR(CheckSame("head dim", owner.layout.head_dim, reader.layout.head_dim));
  KVRELAY_RETURN_IF_ERROR(
      CheckSame("block size", owner.layout.block_size, reader.layout.block_size));
  KVRELAY_RETURN_IF_ERROR(
      CheckSame("layers of the model", owner.shard.total_layers, reader.shard.total_layers));
  return CheckSame("KV heads of the model", owner.shard.total_heads, reader.shard.total_heads);
}

}  // namespace

Result<CopyPlan> PlanPull(const PullSide& owner, const PullSide& reader, uint32_t head_begin,
                          uint32_t head_end, TokenRange tokens) {
  KVRELAY_RETURN_IF_ERROR(internal::CheckSide("owner", owner));
  KVRELAY_RETURN_IF_ERROR(internal::CheckSide("reader", reader));
  KVRELAY_RETURN_IF_ERROR(CheckCompatible(owner, reader));
  KVRELAY_RETURN_IF_ERROR(internal::CheckHeads("owner", owner.shard, head_begin, head_end));
  KVRELAY_RETURN_IF_ERROR(internal::CheckHeads("reader", reader.shard, head_begin, head_end));
  const uint32_t layer_begin = std::max(owner.shard.layer_begin, reader.shard.layer_begin);
  const uint32_t layer_end = std::min(owner.shard.layer_end(), reader.shard.layer_end());
  if (layer_begin >= layer_end) {
    return Error(
        Differ("layers, none is held by both", owner.shard.ToString(), reader.shard.ToString()));
  }
  KVRELAY_ASSIGN_OR_RETURN(const auto owner_blocks, internal::BlocksOf("owner", owner, tokens));
  KVRELAY_ASSIGN_OR_RETURN(const auto reader_blocks, internal::BlocksOf("reader", reader, tokens));

  CopyPlan plan;
  plan.src_block_stride = owner.layout.block_stride;
  plan.dst_block_stride = reader.layout.block_stride;
  plan.pairs.reserve(owner_blocks.size());
  for (size_t i = 0; i < owner_blocks.size(); ++i) {
    plan.pairs.push_back({owner_blocks[i], reader_blocks[i]});
  }
  const internal::PlanStrides src = internal::StridesOf(owner.layout);
  const internal::PlanStrides dst = internal::StridesOf(reader.layout);
  for (const internal::TokenSpan& span : internal::CutAtBlocks(tokens, owner.layout.block_size)) {
    const auto add = [&](const TensorPlace& from, const TensorPlace& to) {
      plan.boxes.push_back(internal::MakeBox(
          src, internal::PlaceOf(owner.layout, from, head_begin - owner.shard.head_begin), dst,
          internal::PlaceOf(reader.layout, to, head_begin - reader.shard.head_begin),
          head_end - head_begin, span, owner.layout.row_bytes()));
    };
    for (uint32_t layer = layer_begin; layer < layer_end; ++layer) {
      const uint32_t from = layer - owner.shard.layer_begin;
      const uint32_t to = layer - reader.shard.layer_begin;
      add(owner.layout.k[from], reader.layout.k[to]);
      if (owner.layout.has_v()) add(owner.layout.v[from], reader.layout.v[to]);
    }
  }
  return plan;
}

}  // namespace kvrelay
