#include "kvcache/cuda/long_runs.h"

namespace kvrelay::cuda {
namespace {

// From a place on both sides.
struct Run {
  uint64_t src = 0;
  uint64_t dst = 0;
  uint64_t bytes = 0;
};

// Of one place of the box; empty when they are short.
std::vector<Run> RunsOf(const CopyPlan& plan, const CopyBox& box, uint64_t least) {
  std::vector<Run> runs;
  if (box.casts) return runs;
  const uint64_t in_segment = uint64_t{box.outer.count} * box.inner.count;
  const uint64_t bytes = box.run_bytes * in_segment * box.num_segments;
  const auto most = bytes / least;
  if (in_segment > most) return runs;
  const auto add = [&](uint64_t src, uint64_t dst) {
    if (!runs.empty() && runs.back().src + runs.back().bytes == src &&
        runs.back().dst + runs.back().bytes == dst) {
      runs.back().bytes += box.run_bytes;
    } else {
      runs.push_back({src, dst, box.run_bytes});
    }
  };
  for (const CopySegment& segment :
       std::span(plan.segments).subspan(box.first_segment, box.num_segments)) {
    for (uint32_t i = 0; i < box.outer.count; ++i) {
      for (uint32_t j = 0; j < box.inner.count; ++j) {
        add(segment.src + i * box.outer.src_stride + j * box.inner.src_stride,
            segment.dst + i * box.outer.dst_stride + j * box.inner.dst_stride);
      }
    }
    if (runs.size() > most) return {};
  }
  return runs;
}

}  // namespace

std::optional<std::vector<LongRun>> LongRuns(const CopyPlan& plan,
                                             std::span<const std::byte* const> src_regions,
                                             std::span<std::byte* const> dst_regions,
                                             uint64_t least) {
  std::vector<LongRun> all;
  for (const CopyBox& box : plan.boxes) {
    const std::vector<Run> runs = RunsOf(plan, box, least);
    if (runs.empty()) return std::nullopt;
    for (const CopyPlace& place : std::span(plan.places).subspan(box.first_place, box.num_places)) {
      for (const Run& run : runs) {
        all.push_back({src_regions[place.src_region] + place.src_offset + run.src,
                       dst_regions[place.dst_region] + place.dst_offset + run.dst, run.bytes});
      }
    }
  }
  return all;
}

}  // namespace kvrelay::cuda
