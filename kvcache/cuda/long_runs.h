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

// From these lengths on the copy engine is faster than the gather kernel on 16 multiprocessors, and
// takes none. Over NVLink: batches reach 330, 374 and 388 GB/s with runs of 1, 4 and 16 MiB, the
// kernel 364. Within a GPU a copy costs the host 3.4 us: 312, 817 and 1474 GB/s, the kernel 740,
// 1430 and 1680 with 16, 32 and 64 multiprocessors.
inline constexpr uint64_t kLongRunFromPeer = 4 << 20;
inline constexpr uint64_t kLongRunWithin = 16 << 20;
inline constexpr uint32_t kSmsBelowEngine = 32;

// The plan's runs, where blocks that follow each other on both sides are one. Nothing when a box
// casts, or its runs are shorter than `least` bytes in the mean. `plan` has passed Validate.
// O(segments) unless there is something.
std::optional<std::vector<LongRun>> LongRuns(const CopyPlan& plan,
                                             std::span<const std::byte* const> src_regions,
                                             std::span<std::byte* const> dst_regions,
                                             uint64_t least);

}  // namespace kvrelay::cuda
