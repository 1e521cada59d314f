// The runs of a copy plan one after another, neighbours joined: what one-sided operations are
// posted from.
#pragma once

#include <cstdint>
#include <optional>

#include "kvcache/copy_plan.h"

namespace kvrelay::transport {

// One thread. O(1) memory beside the plan.
class PlanRuns {
 public:
  struct Run {
    RegionId src_region = 0;
    RegionId dst_region = 0;
    uint64_t src = 0;  // bytes from the region's start
    uint64_t dst = 0;
    uint64_t bytes = 0;
  };

  // `plan` has passed Validate and casts nothing.
  explicit PlanRuns(CopyPlan plan);

  // The next bytes that are contiguous on both sides, across segments and boxes, at most
  // `max_bytes` of them; nullopt after the last. Over all calls every byte of the plan comes once.
  std::optional<Run> Next(uint64_t max_bytes);

 private:
  // Moves on to the next run of the plan: upcoming_.
  void Advance();

  const CopyPlan plan_;
  // Where upcoming_ comes from, one step ahead.
  size_t box_ = 0;
  uint32_t place_ = 0;
  uint32_t segment_ = 0;
  uint32_t outer_ = 0;
  uint32_t inner_ = 0;
  Run upcoming_;  // 0 bytes: the plan is over
  Run joined_;    // the part of it that was not returned yet
};

// Bytes of an average run after joining, as its first ones tell; long ones count as 64 KiB.
uint64_t MeanRunBytes(const CopyPlan& plan);

}  // namespace kvrelay::transport
