// A copy plan in steps: a transfer thread copies some megabytes, looks around (cancelled? past the
// deadline? peer dead?), and goes on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvcache/copy_plan.h"

namespace kvrelay::transport {

class PlanCursor {
 public:
  // `plan` has passed Validate.
  explicit PlanCursor(CopyPlan plan);

  bool done() const { return left_.empty(); }
  // Executes the next part of the plan, of at most `max_bytes` (> 0), and returns the bytes copied.
  // Every byte of the plan is copied once over all calls.
  uint64_t Step(uint64_t max_bytes, std::span<const std::byte* const> src_regions,
                std::span<std::byte* const> dst_regions);

 private:
  std::vector<CopyBox> left_;  // not copied yet; the next one last
  CopyPlan step_;              // holds the plan's pairs all the time, and the boxes of one step
};

}  // namespace kvrelay::transport
