#include "transport/plan_runs.h"

#include <algorithm>
#include <utility>

namespace kvrelay::transport {

PlanRuns::PlanRuns(CopyPlan plan) : plan_(std::move(plan)) { Advance(); }

void PlanRuns::Advance() {
  if (box_ == plan_.boxes.size()) {
    upcoming_ = {};
    return;
  }
  const CopyBox& box = plan_.boxes[box_];
  const CopyPlace& place = plan_.places[box.first_place + place_];
  const CopySegment& segment = plan_.segments[box.first_segment + segment_];
  upcoming_ = {.src_region = place.src_region,
               .dst_region = place.dst_region,
               .src = place.src_offset + segment.src + outer_ * box.outer.src_stride +
                      inner_ * box.inner.src_stride,
               .dst = place.dst_offset + segment.dst + outer_ * box.outer.dst_stride +
                      inner_ * box.inner.dst_stride,
               .bytes = box.run_bytes};
  if (++inner_ < box.inner.count) return;
  inner_ = 0;
  if (++outer_ < box.outer.count) return;
  outer_ = 0;
  if (++segment_ < box.num_segments) return;
  segment_ = 0;
  if (++place_ < box.num_places) return;
  place_ = 0;
  ++box_;
}

std::optional<PlanRuns::Run> PlanRuns::Next(uint64_t max_bytes) {
  const auto follows = [this] {
    return upcoming_.bytes > 0 && upcoming_.src_region == joined_.src_region &&
           upcoming_.dst_region == joined_.dst_region &&
           upcoming_.src == joined_.src + joined_.bytes &&
           upcoming_.dst == joined_.dst + joined_.bytes;
  };
  if (joined_.bytes == 0) {
    if (upcoming_.bytes == 0) return std::nullopt;
    joined_ = upcoming_;
    Advance();
  }
  while (joined_.bytes < max_bytes && follows()) {
    joined_.bytes += upcoming_.bytes;
    Advance();
  }
  Run run = joined_;
  run.bytes = std::min(run.bytes, max_bytes);
  joined_.src += run.bytes;
  joined_.dst += run.bytes;
  joined_.bytes -= run.bytes;
  return run;
}

uint64_t MeanRunBytes(const CopyPlan& plan) {
  constexpr uint64_t kLong = 64 << 10;
  constexpr uint64_t kLook = 256;  // runs
  PlanRuns all(plan);
  uint64_t runs = 0;
  uint64_t bytes = 0;
  while (runs < kLook) {
    const auto run = all.Next(kLong);
    if (!run.has_value()) break;
    ++runs;
    bytes += run->bytes;
  }
  return runs == 0 ? 0 : bytes / runs;
}

}  // namespace kvrelay::transport
