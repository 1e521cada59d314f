// Which plans a GPU's copy engine carries out: those of nothing but long runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kvcache/copy_plan.h"

namespace kvrelay::cuda {

struct LongRun {
  const std::byte* src = nullptr;
  std::byte* dst = nullptr;
  uint64_t bytes = 0;
};

// From this length on the copy engine is as fast as the gather kernel, and takes no multiprocessor.
inline constexpr uint64_t kLongRunBytes = 1 << 20;

// The plan's runs, where blocks that follow each other on both sides are one. Nothing when a box
// casts, or its runs are shorter than kLongRunBytes in the mean. `plan` has passed Validate.
// O(segments) unless there is something.
std::optional<std::vector<LongRun>> LongRuns(const CopyPlan& plan,
                                             std::span<const std::byte* const> src_regions,
                                             std::span<std::byte* const> dst_regions);

}  // namespace kvrelay::cuda
