// A box of a copy plan, flattened for the gather kernel.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "base/status.h"
#include "kvcache/copy_plan.h"
#include "kvcache/cuda/gather_args.h"

namespace kvrelay::cuda {

// Appends the box, in parts where it has too many units; first_chunk is left to the caller. Errors
// as GatherCuda::Make.
Status AppendGatherBoxes(const CopyPlan& plan, const CopyBox& box,
                         std::span<const std::byte* const> src_regions,
                         std::span<std::byte* const> dst_regions, std::vector<GatherBox>& boxes);

}  // namespace kvrelay::cuda
