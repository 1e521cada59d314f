// The host executor of a copy plan.
#pragma once

#include <cstddef>
#include <span>

#include "kvcache/copy_plan.h"

namespace kvrelay {

// Copies everything that a validated plan names; bases by RegionId. Returns when all bytes are
// stored, non-temporal stores fenced. Any thread; large copies use ParallelFor.
//
// The source may be another process's memory that is being overwritten meanwhile: the caller reads
// the lease record before and after and throws the bytes away when it changed (an optimistic read).
// It is the one function in the project that is allowed to race, and is annotated so.
void ExecuteCopy(const CopyPlan& plan, std::span<const std::byte* const> src_regions,
                 std::span<std::byte* const> dst_regions);

}  // namespace kvrelay
