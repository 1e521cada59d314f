// The steps that every plan is made of: a token range cut into segments, and boxes of one head
// range of some tensors over these segments.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kvcache/copy_plan.h"
#include "kvcache/plan_pull.h"

namespace kvrelay::internal {

// How one side lays out the tensors of one kind: a cache, or a chunk of the canonical stream. The
// unit along the token axis is a token, or a page where pages are opaque; its row is one head's.
struct PlanSide {
  uint64_t block_stride = 0;
  uint64_t head_stride = 0;
  uint64_t unit_stride = 0;
  uint64_t row_bytes = 0;
  DType dtype = DType::kFp32;
  uint32_t block_size = 0;  // units
  std::span<const BlockId> blocks;
  uint32_t first = 0;  // unit that blocks[0] begins with
};

// The parts of a range that are neighbours in a block on both sides: segments of equal length.
struct SegmentGroup {
  uint32_t units = 0;  // of each segment
  uint32_t first_segment = 0;
  uint32_t num_segments = 0;
};

// Cuts `units` wherever a block of either side ends and appends the segments to the plan, longest
// first. Both sides' blocks cover the range.
std::vector<SegmentGroup> AppendSegments(CopyPlan& plan, const PlanSide& src, const PlanSide& dst,
                                         TokenRange units);

// Tensors that are copied alike: tensor t of layer l is places[l * per_layer + t], at its first
// head. Numbers of tensor i, head h are multiplied by factors[i * heads + h]. It is a plain copy
// when the dtypes are the same and all factors 1, or there are none.
struct TensorSet {
  std::vector<CopyPlace> places;
  std::vector<float> factors;
  uint32_t per_layer = 1;
  uint32_t heads = 0;
};

// Appends the boxes, one for each group. Dimensions that continue their inner neighbours on both
// sides are merged, K with V and layers with layers where they lie side by side, so that runs are
// as long and places as few as they can be.
void AppendBoxes(CopyPlan& plan, const PlanSide& src, const PlanSide& dst,
                 std::span<const SegmentGroup> groups, TensorSet set);

// The strides of one kind of layers of a cache, without its blocks.
PlanSide StridesOf(const KvLayout& layout, const KvKind& kind);
// Layers (global numbers, ascending) that both sides hold, and of which kind they are on each.
struct CommonLayers {
  uint32_t owner_kind = 0;
  uint32_t reader_kind = 0;
  std::vector<uint32_t> layers;
};
// All of them; none when the sides hold no layer in common.
std::vector<CommonLayers> CommonLayersOf(const PullSide& owner, const PullSide& reader);

// What the reader needs of `tokens` for such layers: all, or where it keeps a window the part of
// it.
TokenRange NeededTokens(const PullSide& reader, uint32_t kind, TokenRange tokens);

// The scales that hold for this pull.
const KvScales& ScalesOf(const PullSide& side);
// kInvalidArgument where they come with the request and are not there.
Status CheckScalesKnown(std::string_view name, const PullSide& side);

// The table of one kind of layers.
const TableView& TableOf(const PullSide& side, uint32_t kind);
// StridesOf the kind, and the blocks that its table gives to `tokens`. kInvalidArgument when the
// table does not cover them, names a block that does not exist, or a page would be cut.
Result<PlanSide> SideOf(std::string_view name, const PullSide& side, uint32_t kind,
                        TokenRange tokens);
// The same range in units of SideOf.
TokenRange UnitsOf(const KvLayout& layout, const KvKind& kind, TokenRange tokens);

// Where a cache's tensor begins with `head`, which counts inside the shard.
struct SidePlace {
  RegionId region = 0;
  uint64_t offset = 0;
};
SidePlace PlaceOf(const TensorPlace& tensor, const KvKind& kind, uint32_t head);

// Appends from / to, the factor that turns numbers of scale `from` into numbers of scale `to`.
// kIncompatible when it is no normal number.
Status AddFactor(float from, float to, std::vector<float>& factors);

// The scale of one stored tensor and head; 1 without scales.
class ScaleOf {
 public:
  explicit ScaleOf(const PullSide& side);
  float operator()(bool is_v, uint32_t layer, uint32_t head) const;

 private:
  const KvScales& scales_;
  std::vector<uint32_t> first_head_;  // by layer; per head only
};

// kInvalidArgument when a side's shard and layout contradict each other or themselves. Addresses
// are not checked: CopyPlan::Validate does that.
Status CheckSide(std::string_view name, const KvLayout& layout, const KvShard& shard);

// kInvalidArgument unless [head_begin, head_end) is a part, not empty, of what the side holds.
Status CheckHeads(std::string_view name, const KvShard& shard, uint32_t head_group,
                  uint32_t head_begin, uint32_t head_end);

// kIncompatible, with both sides' values.
Status Differ(std::string_view what, std::string_view owner, std::string_view reader);

}  // namespace kvrelay::internal
