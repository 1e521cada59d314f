// A copy between two caches as pure data: places x segments x two strided dimensions x a run.
// O(layers + blocks), never O(slices). A plan never crosses the wire; the host copy and a GPU
// kernel walk the same value.
//
// What box b copies, in the order in which its bytes are numbered:
//   for each place p of [b.first_place, + b.num_places)
//     for each segment s of [b.first_segment, + b.num_segments)
//       for i in [0, b.outer.count), for j in [0, b.inner.count)
//         one run, contiguous on both sides,
//         from src region p.src_region at p.src_offset + s.src + i * b.outer.src_stride
//                                         + j * b.inner.src_stride, of b.src_run_bytes() bytes,
//         to   dst region p.dst_region at p.dst_offset + s.dst + i * b.outer.dst_stride
//                                         + j * b.inner.dst_stride, of b.run_bytes bytes.
// A box without a cast copies the run's bytes. One with a cast converts each of the run's elements:
//   to[n] = Round_to(float(from[n]) * f), with f = plan.factors[b.cast.first_factor
//           + (p - b.first_place) * b.cast.place_step + i * b.cast.outer_step + j *
//           b.cast.inner_step]
// where the product is rounded to fp32 once and Round_to is the one of kvcache/convert.h: to the
// nearest, ties to even, saturating.
//
// All runs of a box have the same length, so that byte or unit n of a box is found by divisions by
// constants: run, inner, outer, segment, place, from the innermost out. Runs of different boxes do
// not overlap in the destination; boxes may be carried out in any order and in parallel.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "kvcache/layout.h"

namespace kvrelay {

// Where one tensor (one layer's K, say) begins on both sides.
struct CopyPlace {
  RegionId src_region = 0;
  RegionId dst_region = 0;
  uint64_t src_offset = 0;  // bytes from the region's start
  uint64_t dst_offset = 0;
  bool operator==(const CopyPlace&) const = default;
};

// Where one contiguous span of tokens begins, in bytes from a place: tokens that are neighbours in
// one block on both sides. With equal block sizes one segment is one block.
struct CopySegment {
  uint64_t src = 0;
  uint64_t dst = 0;
  bool operator==(const CopySegment&) const = default;
};

struct CopyDim {
  uint32_t count = 1;
  uint64_t src_stride = 0;  // bytes
  uint64_t dst_stride = 0;
  bool operator==(const CopyDim&) const = default;
};

struct CopyCast {
  DType from = DType::kFp32;
  DType to = DType::kFp32;
  uint32_t first_factor = 0;
  uint32_t place_step = 0;  // factors from one place to the next; 0: all share
  uint32_t outer_step = 0;
  uint32_t inner_step = 0;
  bool operator==(const CopyCast&) const = default;
};

struct CopyBox {
  uint32_t first_place = 0;
  uint32_t num_places = 1;
  uint32_t first_segment = 0;
  uint32_t num_segments = 1;
  CopyDim outer;
  CopyDim inner;           // of the two the one with the smaller stride in the destination
  uint64_t run_bytes = 0;  // in the destination; as long as the layouts allow
  bool casts = false;
  CopyCast cast;  // only if `casts`
  bool operator==(const CopyBox&) const = default;

  // In the source.
  uint64_t src_run_bytes() const {
    return casts ? run_bytes / SizeOf(cast.to) * SizeOf(cast.from) : run_bytes;
  }
  uint64_t runs() const { return uint64_t{num_places} * num_segments * outer.count * inner.count; }
  uint64_t bytes() const { return run_bytes * runs(); }
};

struct CopyPlan {
  std::vector<CopyBox> boxes;  // a few: one per kind of layer and distinct length of segments
  std::vector<CopyPlace> places;
  std::vector<CopySegment> segments;
  std::vector<float> factors;  // of the casts
  bool operator==(const CopyPlan&) const = default;

  uint64_t bytes() const;      // written, all boxes
  uint64_t src_bytes() const;  // read
  uint64_t slices() const;     // number of runs
  uint64_t memory() const;     // bytes of the plan itself
  bool casts() const;          // some box does
  // Every byte that the plan touches lies inside its region (bytes by RegionId), and every cast's
  // factors exist. Executors require a plan that passed.
  Status Validate(std::span<const uint64_t> src_region_bytes,
                  std::span<const uint64_t> dst_region_bytes) const;
};

// One run of a plan, as numbers.
struct PlanRun {
  RegionId src_region = 0;
  RegionId dst_region = 0;
  uint64_t src = 0;  // bytes from the region's start
  uint64_t dst = 0;
  float factor = 1;  // if the box casts
};

// Calls fn(box, run) for every run in order: the definition above, for tests and simulations. The
// executors have loops of their own.
template <typename Fn>
void ForEachRun(const CopyPlan& plan, Fn&& fn) {
  for (const CopyBox& box : plan.boxes) {
    for (uint32_t p = 0; p < box.num_places; ++p) {
      const CopyPlace& place = plan.places[box.first_place + p];
      for (uint32_t s = 0; s < box.num_segments; ++s) {
        const CopySegment& segment = plan.segments[box.first_segment + s];
        for (uint32_t i = 0; i < box.outer.count; ++i) {
          for (uint32_t j = 0; j < box.inner.count; ++j) {
            PlanRun run{place.src_region, place.dst_region,
                        place.src_offset + segment.src + i * box.outer.src_stride +
                            j * box.inner.src_stride,
                        place.dst_offset + segment.dst + i * box.outer.dst_stride +
                            j * box.inner.dst_stride};
            if (box.casts) {
              run.factor = plan.factors[box.cast.first_factor + p * box.cast.place_step +
                                        i * box.cast.outer_step + j * box.cast.inner_step];
            }
            fn(box, run);
          }
        }
      }
    }
  }
}

}  // namespace kvrelay
