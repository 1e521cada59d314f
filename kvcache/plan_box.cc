#include "kvcache/plan_box.h"

#include <algorithm>
#include <string>
#include <utility>

namespace kvrelay::internal {
namespace {

// Wraps instead of overflowing when a peer's numbers are absurd; CopyPlan::Validate refuses the
// result.
int64_t Advance(int64_t offset, uint64_t by) {
  return static_cast<int64_t>(static_cast<uint64_t>(offset) + by);
}

}  // namespace

std::vector<TokenSpan> CutAtBlocks(TokenRange tokens, uint32_t block_size) {
  std::vector<TokenSpan> spans;
  uint32_t pair = 0;
  for (uint32_t at = tokens.begin; at < tokens.end;) {
    const uint32_t inside = at % block_size;
    const uint32_t left = tokens.end - at;
    TokenSpan span{inside, std::min(block_size - inside, left), pair, 1};
    if (inside == 0 && left >= block_size) span.num_pairs = left / block_size;
    at += span.tokens * span.num_pairs;
    pair += span.num_pairs;
    spans.push_back(span);
  }
  return spans;
}

CopyBox MakeBox(const PlanStrides& src, const PlanPlace& src_place, const PlanStrides& dst,
                const PlanPlace& dst_place, uint32_t heads, const TokenSpan& span,
                uint64_t row_bytes) {
  CopyBox box;
  box.src_region = src_place.region;
  box.dst_region = dst_place.region;
  box.src_offset = Advance(src_place.offset, span.token_begin * src.token);
  box.dst_offset = Advance(dst_place.offset, span.token_begin * dst.token);
  box.run_bytes = row_bytes;
  box.first_pair = span.first_pair;
  box.num_pairs = span.num_pairs;

  CopyDim inner{heads, static_cast<int64_t>(src.head), static_cast<int64_t>(dst.head)};
  CopyDim outer{span.tokens, static_cast<int64_t>(src.token), static_cast<int64_t>(dst.token)};
  const bool swapped = outer.count > 1 && (inner.count == 1 || outer.dst_stride < inner.dst_stride);
  if (swapped) std::swap(inner, outer);
  const auto continues = [&box](const CopyDim& dim) {
    const auto run = static_cast<int64_t>(box.run_bytes);
    return dim.src_stride == run && dim.dst_stride == run;
  };
  while (inner.count == 1 || continues(inner)) {
    box.run_bytes *= inner.count;
    if (outer.count == 1) {
      inner = CopyDim();
      break;
    }
    inner = std::exchange(outer, CopyDim());
  }
  box.inner = inner;
  box.outer = outer.count == 1 ? CopyDim() : outer;
  return box;
}

PlanStrides StridesOf(const KvLayout& layout) {
  return {layout.block_stride, layout.head_stride, layout.token_stride};
}

PlanPlace PlaceOf(const KvLayout& layout, const TensorPlace& tensor, uint32_t head) {
  return {tensor.region, static_cast<int64_t>(tensor.offset + head * layout.head_stride)};
}

Status CheckSide(std::string_view name, const PullSide& side) {
  const KvLayout& layout = side.layout;
  const KvShard& shard = side.shard;
  if (Status status = shard.Validate(); !status.ok()) return status.Wrap(name);
  if (layout.layers() != shard.layer_count || layout.kv_heads != shard.head_count) {
    return Error(Code::kInvalidArgument, std::string(name) + "'s layout (" + layout.ToString() +
                                             ") and shard (" + shard.ToString() + ") differ");
  }
  if (layout.block_size == 0 || layout.row_bytes() == 0 ||
      (layout.has_v() && layout.v.size() != layout.k.size())) {
    return Error(Code::kInvalidArgument,
                 std::string(name) + "'s layout is not valid: " + layout.ToString());
  }
  return Status::Ok();
}

Status CheckHeads(std::string_view name, const KvShard& shard, uint32_t head_begin,
                  uint32_t head_end) {
  if (head_begin < head_end && head_begin >= shard.head_begin && head_end <= shard.head_end()) {
    return Status::Ok();
  }
  return Error(Code::kInvalidArgument, "KV heads " + std::to_string(head_begin) + " to " +
                                           std::to_string(head_end) + " are not held by " +
                                           std::string(name) + " " + shard.ToString());
}

Result<std::span<const BlockId>> BlocksOf(std::string_view name, const PullSide& side,
                                          TokenRange tokens) {
  const TableView& table = side.table;
  const uint64_t block_size = side.layout.block_size;
  if (table.first_token % block_size != 0) {
    return Error(Code::kInvalidArgument, std::string(name) + "'s table starts at token " +
                                             std::to_string(table.first_token) +
                                             ", no multiple of its block size " +
                                             std::to_string(block_size));
  }
  const uint64_t table_end = table.first_token + table.blocks.size() * block_size;
  if (tokens.begin > tokens.end || tokens.begin < table.first_token || tokens.end > table_end) {
    return Error(Code::kInvalidArgument,
                 std::string(name) + "'s table covers tokens " + std::to_string(table.first_token) +
                     " to " + std::to_string(table_end) + ", needed are " +
                     std::to_string(tokens.begin) + " to " + std::to_string(tokens.end));
  }
  const uint64_t first = (tokens.begin - table.first_token) / block_size;
  if (tokens.size() == 0) return table.blocks.subspan(first, 0);
  const uint64_t last = (tokens.end - table.first_token + block_size - 1) / block_size;
  const std::span<const BlockId> blocks = table.blocks.subspan(first, last - first);
  for (const BlockId block : blocks) {
    if (block >= side.layout.num_blocks) {
      return Error(Code::kInvalidArgument, std::string(name) + "'s table names block " +
                                               std::to_string(block) + ", it has " +
                                               std::to_string(side.layout.num_blocks));
    }
  }
  return blocks;
}

}  // namespace kvrelay::internal
