// The step that every plan is made of: one token span x one head range of one layer's K (or V),
// between two strided places.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kvcache/copy_plan.h"
#include "kvcache/layout.h"
#include "kvcache/shard.h"

namespace kvrelay::internal {

// How one side numbers bytes, whichever layer: a cache's strides, or those of a chunk of the
// canonical stream.
struct PlanStrides {
  uint64_t block = 0;
  uint64_t head = 0;
  uint64_t token = 0;
};

// Where a box starts on one side: first head, token 0 of block 0, in bytes from the region's start.
// Negative where block 0 lies before the region, because no pair names it.
struct PlanPlace {
  RegionId region = 0;
  int64_t offset = 0;
};

// Tokens [token_begin, token_begin + tokens) inside each block of a run of pairs.
struct TokenSpan {
  uint32_t token_begin = 0;
  uint32_t tokens = 0;
  uint32_t first_pair = 0;
  uint32_t num_pairs = 0;
};

// A range of tokens cut where its place inside a block changes: the rest of a first block, whole
// blocks, the beginning of a last one. Pair i is the i-th block that the range touches. At most
// three.
std::vector<TokenSpan> CutAtBlocks(TokenRange tokens, uint32_t block_size);

// `heads` heads from both places, and one span. Dimensions that continue their inner neighbour on
// both sides are merged, so that run_bytes is as long as it can be; of two that remain the inner
// one has the smaller stride in the destination.
CopyBox MakeBox(const PlanStrides& src, const PlanPlace& src_place, const PlanStrides& dst,
                const PlanPlace& dst_place, uint32_t heads, const TokenSpan& span,
                uint64_t row_bytes);

// The strides and places of a cache. `head` counts inside the shard.
PlanStrides StridesOf(const KvLayout& layout);
PlanPlace PlaceOf(const KvLayout& layout, const TensorPlace& tensor, uint32_t head);

// kInvalidArgument when a side's shard and layout contradict each other or themselves. Addresses
// are not checked: CopyPlan::Validate does that.
Status CheckSide(std::string_view name, const PullSide& side);

// kInvalidArgument unless [head_begin, head_end) is a part, not empty, of what the side holds.
Status CheckHeads(std::string_view name, const KvShard& shard, uint32_t head_begin,
                  uint32_t head_end);

// The blocks that hold `tokens`, in order. kInvalidArgument when the table does not cover them, or
// names a block that does not exist.
Result<std::span<const BlockId>> BlocksOf(std::string_view name, const PullSide& side,
                                          TokenRange tokens);

}  // namespace kvrelay::internal
