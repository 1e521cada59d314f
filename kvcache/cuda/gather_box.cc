#include "kvcache/cuda/gather_box.h"

#include <algorithm>
#include <bit>
#include <string>

namespace kvrelay::cuda {
namespace {

constexpr uint64_t kMaxUnits = 0x7fffffff;

// What all addresses of a box are sums of, or'ed: their trailing zeros are how they are aligned.
GatherPair AddressBits(const CopyPlan& plan, const CopyBox& box,
                       std::span<const std::byte* const> src_regions,
                       std::span<std::byte* const> dst_regions) {
  GatherPair bits = {box.src_run_bytes(), box.run_bytes};
  for (const CopyDim& dim : {box.inner, box.outer}) {
    if (dim.count == 1) continue;
    bits.src |= dim.src_stride;
    bits.dst |= dim.dst_stride;
  }
  for (const CopyPlace& place : std::span(plan.places).subspan(box.first_place, box.num_places)) {
    bits.src |= reinterpret_cast<uintptr_t>(src_regions[place.src_region]) | place.src_offset;
    bits.dst |= reinterpret_cast<uintptr_t>(dst_regions[place.dst_region]) | place.dst_offset;
  }
  for (const CopySegment& segment :
       std::span(plan.segments).subspan(box.first_segment, box.num_segments)) {
    bits.src |= segment.src;
    bits.dst |= segment.dst;
  }
  return bits;
}

// Bytes of a unit on both sides.
GatherPair UnitOf(const CopyBox& box, const GatherPair& bits) {
  const auto aligned = [](uint64_t all, uint64_t bytes) {
    return all % std::min<uint64_t>(bytes, 16) == 0;
  };
  if (box.casts) {
    const GatherPair one = {SizeOf(box.cast.from), SizeOf(box.cast.to)};
    const GatherPair unit = {one.src * kCastElements, one.dst * kCastElements};
    const bool whole = box.run_bytes % unit.dst == 0;
    return whole && aligned(bits.src, unit.src) && aligned(bits.dst, unit.dst) ? unit : one;
  }
  const uint64_t unit = uint64_t{1} << std::countr_zero(bits.src | bits.dst | 16);
  return {unit, unit};
}

}  // namespace

Status AppendGatherBoxes(const CopyPlan& plan, const CopyBox& box,
                         std::span<const std::byte* const> src_regions,
                         std::span<std::byte* const> dst_regions, std::vector<GatherBox>& boxes) {
  const GatherPair unit = UnitOf(box, AddressBits(plan, box, src_regions, dst_regions));
  const uint64_t run_units = box.run_bytes / unit.dst;
  const uint64_t runs = uint64_t{box.outer.count} * box.inner.count;
  if (run_units > kMaxUnits || runs > kMaxUnits / run_units) {
    return Error(Code::kTooLarge, "copy plan: " + std::to_string(box.run_bytes) + " bytes x " +
                                      std::to_string(runs) + " in one segment are more than " +
                                      std::to_string(kMaxUnits) + " units of " +
                                      std::to_string(unit.dst) + " bytes");
  }
  const uint64_t segment_units = run_units * runs;
  const auto most_segments =
      static_cast<uint32_t>(std::min<uint64_t>(kMaxUnits / segment_units, box.num_segments));
  const uint64_t most_places =
      most_segments < box.num_segments ? 1 : kMaxUnits / (segment_units * box.num_segments);
  for (uint64_t p = 0; p < box.num_places; p += most_places) {
    for (uint64_t s = 0; s < box.num_segments; s += most_segments) {
      const auto places = std::min<uint64_t>(most_places, box.num_places - p);
      const auto segments = std::min<uint64_t>(most_segments, box.num_segments - s);
      GatherBox part;
      part.units = static_cast<uint32_t>(segment_units * segments * places);
      part.src_unit = static_cast<uint32_t>(unit.src);
      part.dst_unit = static_cast<uint32_t>(unit.dst);
      part.run_units = Divisor(static_cast<uint32_t>(run_units));
      part.inner = Divisor(box.inner.count);
      part.outer = Divisor(box.outer.count);
      part.segments = Divisor(static_cast<uint32_t>(segments));
      part.first_segment = static_cast<uint32_t>(box.first_segment + s);
      part.first_place = static_cast<uint32_t>(box.first_place + p);
      part.inner_stride = {box.inner.src_stride, box.inner.dst_stride};
      part.outer_stride = {box.outer.src_stride, box.outer.dst_stride};
      part.narrow_strides = (box.inner.src_stride | box.inner.dst_stride | box.outer.src_stride |
                             box.outer.dst_stride) <= UINT32_MAX;
      if (box.casts) {
        part.from = box.cast.from;
        part.to = box.cast.to;
        part.first_factor = static_cast<uint32_t>(box.cast.first_factor + p * box.cast.place_step);
        part.place_step = box.cast.place_step;
        part.outer_step = box.cast.outer_step;
        part.inner_step = box.cast.inner_step;
      }
      boxes.push_back(part);
    }
  }
  return Status::Ok();
}

}  // namespace kvrelay::cuda
