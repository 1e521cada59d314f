#include "kvcache/copy_plan.h"

#include <algorithm>
#include <string>
#include <string_view>

namespace kvrelay {
namespace {

// Wide enough that nothing below can overflow: sums of a few 64-bit offsets and 32-bit counts times
// 64-bit strides.
__extension__ using Wide = unsigned __int128;

// How far past a place the furthest byte of some boxes is, on both sides.
struct Reach {
  Wide src = 0;
  Wide dst = 0;
};

Error Bad(size_t box, const std::string& what) {
  return Error(Code::kInvalidArgument, "copy plan: box " + std::to_string(box) + " " + what);
}

bool IsPart(uint32_t first, uint32_t count, size_t size) {
  return count > 0 && first <= size && count <= size - first;
}

std::string PartText(uint32_t first, uint32_t count, size_t size) {
  return std::to_string(first) + " + " + std::to_string(count) + " of " + std::to_string(size);
}

Status CheckCast(const CopyPlan& plan, size_t index) {
  const CopyBox& box = plan.boxes[index];
  const CopyCast& cast = box.cast;
  const uint32_t from = SizeOf(cast.from);
  const uint32_t to = SizeOf(cast.to);
  if (from == 0 || to == 0 || box.run_bytes % to != 0 ||
      box.run_bytes / to > UINT64_MAX / sizeof(uint64_t)) {
    return Bad(index, "casts runs of " + std::to_string(box.run_bytes) + " bytes to elements of " +
                          std::to_string(to) + " from ones of " + std::to_string(from));
  }
  const Wide last = Wide{cast.first_factor} + Wide{box.num_places - 1} * cast.place_step +
                    Wide{box.outer.count - 1} * cast.outer_step +
                    Wide{box.inner.count - 1} * cast.inner_step;
  if (last < plan.factors.size()) return Status::Ok();
  return Bad(index,
             "casts with more factors than there are: " + std::to_string(plan.factors.size()));
}

// Everything about one box but its places.
Status CheckShape(const CopyPlan& plan, size_t index) {
  const CopyBox& box = plan.boxes[index];
  if (box.run_bytes == 0 || box.inner.count == 0 || box.outer.count == 0) {
    return Bad(index, "is empty");
  }
  if (!IsPart(box.first_segment, box.num_segments, plan.segments.size())) {
    return Bad(index, "names segments " +
                          PartText(box.first_segment, box.num_segments, plan.segments.size()));
  }
  if (!IsPart(box.first_place, box.num_places, plan.places.size())) {
    return Bad(index,
               "names places " + PartText(box.first_place, box.num_places, plan.places.size()));
  }
  return box.casts ? CheckCast(plan, index) : Status::Ok();
}

Reach ReachOf(const CopyPlan& plan, const CopyBox& box) {
  CopySegment furthest;
  for (const CopySegment& segment :
       std::span(plan.segments).subspan(box.first_segment, box.num_segments)) {
    furthest.src = std::max(furthest.src, segment.src);
    furthest.dst = std::max(furthest.dst, segment.dst);
  }
  Reach reach{Wide{furthest.src} + box.src_run_bytes(), Wide{furthest.dst} + box.run_bytes};
  for (const CopyDim& dim : {box.inner, box.outer}) {
    reach.src += Wide{dim.count - 1} * dim.src_stride;
    reach.dst += Wide{dim.count - 1} * dim.dst_stride;
  }
  return reach;
}

Status CheckInside(size_t box, std::string_view side, RegionId region, Wide end,
                   std::span<const uint64_t> region_bytes) {
  if (region >= region_bytes.size()) {
    return Bad(box, "names " + std::string(side) + " region " + std::to_string(region) +
                        ", there are " + std::to_string(region_bytes.size()));
  }
  if (end <= region_bytes[region]) return Status::Ok();
  return Bad(box, "leaves " + std::string(side) + " region " + std::to_string(region) + " of " +
                      std::to_string(region_bytes[region]) + " bytes");
}

}  // namespace

uint64_t CopyPlan::bytes() const {
  uint64_t sum = 0;
  for (const CopyBox& box : boxes) sum += box.bytes();
  return sum;
}

uint64_t CopyPlan::src_bytes() const {
  uint64_t sum = 0;
  for (const CopyBox& box : boxes) sum += box.src_run_bytes() * box.runs();
  return sum;
}

uint64_t CopyPlan::slices() const {
  uint64_t sum = 0;
  for (const CopyBox& box : boxes) sum += box.runs();
  return sum;
}

uint64_t CopyPlan::memory() const {
  return sizeof(*this) + boxes.size() * sizeof(CopyBox) + places.size() * sizeof(CopyPlace) +
         segments.size() * sizeof(CopySegment) + factors.size() * sizeof(float);
}

bool CopyPlan::casts() const {
  return std::ranges::any_of(boxes, [](const CopyBox& box) { return box.casts; });
}

Status CopyPlan::Validate(std::span<const uint64_t> src_region_bytes,
                          std::span<const uint64_t> dst_region_bytes) const {
  Reach reach;
  for (size_t i = 0; i < boxes.size(); ++i) {
    KVRELAY_RETURN_IF_ERROR(CheckShape(*this, i));
    const CopyBox& box = boxes[i];
    const Reach own = ReachOf(*this, box);
    reach = {std::max(reach.src, own.src), std::max(reach.dst, own.dst)};
    // Boxes of the same places follow each other, so that each place is looked at about once.
    if (i + 1 < boxes.size() && boxes[i + 1].first_place == box.first_place &&
        boxes[i + 1].num_places == box.num_places) {
      continue;
    }
    for (const CopyPlace& place : std::span(places).subspan(box.first_place, box.num_places)) {
      KVRELAY_RETURN_IF_ERROR(CheckInside(i, "source", place.src_region,
                                          reach.src + place.src_offset, src_region_bytes));
      KVRELAY_RETURN_IF_ERROR(CheckInside(i, "destination", place.dst_region,
                                          reach.dst + place.dst_offset, dst_region_bytes));
    }
    reach = {};
  }
  return Status::Ok();
}

}  // namespace kvrelay
