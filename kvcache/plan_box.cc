#include "kvcache/plan_box.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

namespace kvrelay::internal {
namespace {

// Walks the blocks of one side; wraps instead of overflowing when a peer's numbers are absurd:
// CopyPlan::Validate refuses the result.
class BlockCursor {
 public:
  BlockCursor(const PlanSide& side, uint32_t unit)
      : side_(side),
        index_((unit - side.first) / side.block_size),
        inside_((unit - side.first) % side.block_size) {}

  uint32_t left() const { return side_.block_size - inside_; }  // units of this block
  uint64_t offset() const {
    return side_.blocks[index_] * side_.block_stride + inside_ * side_.unit_stride;
  }
  void Advance(uint32_t units) {  // at most left()
    inside_ += units;
    if (inside_ < side_.block_size) return;
    inside_ = 0;
    ++index_;
  }

 private:
  const PlanSide& side_;
  uint32_t index_;
  uint32_t inside_;
};

struct Dim {
  CopyDim dim;
  bool merges = true;
  uint32_t tensors = 0;  // bit of the folded tensor dimension in a set of them
  bool is_head = false;
};

constexpr uint32_t kTensorDim = 1;
constexpr uint32_t kLayerDim = 2;

// The constant distance from places[i] to places[i + step], for all i that `wanted` names, or
// nothing.
template <typename Wanted>
std::optional<CopyDim> Distance(const std::vector<CopyPlace>& places, size_t step, uint32_t count,
                                Wanted wanted) {
  std::optional<CopyDim> distance;
  for (size_t i = 0; i + step < places.size(); ++i) {
    if (!wanted(i)) continue;
    const CopyPlace& a = places[i];
    const CopyPlace& b = places[i + step];
    if (a.src_region != b.src_region || a.dst_region != b.dst_region) return {};
    const CopyDim dim{count, b.src_offset - a.src_offset, b.dst_offset - a.dst_offset};
    if (distance && dim != *distance) return {};
    distance = dim;
  }
  return distance;
}

// What the factors depend on; the shortest list that says it.
struct Factors {
  std::vector<float> values;
  bool per_tensor = false;
  bool per_head = false;
};

Factors Shorten(const TensorSet& set) {
  Factors factors;
  const size_t heads = set.heads;
  for (size_t i = 0; i < set.factors.size(); ++i) {
    factors.per_head |= set.factors[i] != set.factors[i - i % heads];
    factors.per_tensor |= set.factors[i] != set.factors[i % heads];
  }
  const size_t tensors = factors.per_tensor ? set.places.size() : 1;
  for (size_t tensor = 0; tensor < tensors; ++tensor) {
    for (size_t head = 0; head < (factors.per_head ? heads : 1); ++head) {
      factors.values.push_back(set.factors[tensor * heads + head]);
    }
  }
  return factors;
}

}  // namespace

std::vector<SegmentGroup> AppendSegments(CopyPlan& plan, const PlanSide& src, const PlanSide& dst,
                                         TokenRange units) {
  struct Piece {
    CopySegment segment;
    uint32_t units;
  };
  std::vector<Piece> pieces;
  pieces.reserve(units.size() / src.block_size + units.size() / dst.block_size + 2);
  // How many pieces there are of each length, then where those of this length begin.
  std::vector<uint32_t> places(std::min({src.block_size, dst.block_size, units.size()}) +
                               size_t{1});
  BlockCursor from(src, units.begin);
  BlockCursor to(dst, units.begin);
  for (uint32_t left = units.size(); left > 0;) {
    const uint32_t taken = std::min({from.left(), to.left(), left});
    pieces.push_back({{from.offset(), to.offset()}, taken});
    ++places[taken];
    from.Advance(taken);
    to.Advance(taken);
    left -= taken;
  }
  std::vector<SegmentGroup> groups;
  auto next = static_cast<uint32_t>(plan.segments.size());
  for (auto length = static_cast<uint32_t>(places.size() - 1); length > 0; --length) {
    const uint32_t count = std::exchange(places[length], next);
    if (count > 0) groups.push_back({length, next, count});
    next += count;
  }
  plan.segments.resize(next);
  for (const Piece& piece : pieces) plan.segments[places[piece.units]++] = piece.segment;
  return groups;
}

void AppendBoxes(CopyPlan& plan, const PlanSide& src, const PlanSide& dst,
                 std::span<const SegmentGroup> groups, TensorSet set) {
  if (groups.empty() || set.places.empty()) return;
  const bool casts =
      !set.factors.empty() &&
      (src.dtype != dst.dtype || std::any_of(set.factors.begin(), set.factors.end(),
                                             [](float factor) { return factor != 1; }));
  Factors factors;
  if (casts) factors = Shorten(set);

  std::vector<Dim> tensor_dims;
  const auto per_layer = set.per_layer;
  const auto layers = static_cast<uint32_t>(set.places.size() / per_layer);
  if (per_layer > 1 && !factors.per_tensor) {
    const auto k_to_v =
        Distance(set.places, 1, per_layer, [&](size_t i) { return (i + 1) % per_layer != 0; });
    if (k_to_v) tensor_dims.push_back({*k_to_v, true, kTensorDim});
  }
  if (layers > 1 && !factors.per_tensor) {
    const auto to_next = Distance(set.places, per_layer, layers, [](size_t) { return true; });
    if (to_next) tensor_dims.push_back({*to_next, true, kLayerDim});
  }

  const auto first_factor = static_cast<uint32_t>(plan.factors.size());
  plan.factors.insert(plan.factors.end(), factors.values.begin(), factors.values.end());
  std::array<std::optional<uint32_t>, 4> first_place;  // by the tensor dimensions that are folded
  for (const SegmentGroup& group : groups) {
    std::vector<Dim> dims = tensor_dims;
    dims.push_back({{set.heads, src.head_stride, dst.head_stride}, !factors.per_head, 0, true});
    dims.push_back({{group.units, src.unit_stride, dst.unit_stride}});
    std::erase_if(dims, [](const Dim& d) { return d.dim.count == 1; });
    std::sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) {
      return std::tie(a.dim.dst_stride, a.dim.src_stride) <
             std::tie(b.dim.dst_stride, b.dim.src_stride);
    });
    CopyBox box;
    box.run_bytes = dst.row_bytes;
    uint64_t src_run = src.row_bytes;
    uint32_t folded = 0;
    size_t at = 0;
    for (; at < dims.size() && dims[at].merges && dims[at].dim.src_stride == src_run &&
           dims[at].dim.dst_stride == box.run_bytes;
         ++at) {
      src_run *= dims[at].dim.count;
      box.run_bytes *= dims[at].dim.count;
      folded |= dims[at].tensors;
    }
    CopyCast cast{src.dtype, dst.dtype, first_factor};
    CopyDim* left[] = {&box.inner, &box.outer};
    uint32_t* steps[] = {&cast.inner_step, &cast.outer_step};
    for (size_t i = 0; at < dims.size(); ++at) {
      if (dims[at].tensors != 0) continue;
      *left[i] = dims[at].dim;
      *steps[i++] = dims[at].is_head && factors.per_head ? 1 : 0;
    }
    if (factors.per_tensor) cast.place_step = factors.per_head ? set.heads : 1;
    box.casts = casts;
    if (casts) box.cast = cast;

    const uint32_t tensors = (folded & kTensorDim) != 0 ? 1 : per_layer;
    box.num_places = tensors * ((folded & kLayerDim) != 0 ? 1 : layers);
    if (!first_place[folded]) {
      first_place[folded] = static_cast<uint32_t>(plan.places.size());
      for (uint32_t i = 0; i < box.num_places; ++i) {
        plan.places.push_back(set.places[i / tensors * per_layer + i % tensors]);
      }
    }
    box.first_place = *first_place[folded];
    box.first_segment = group.first_segment;
    box.num_segments = group.num_segments;
    plan.boxes.push_back(box);
  }
}

}  // namespace kvrelay::internal
