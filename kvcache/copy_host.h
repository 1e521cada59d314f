// The host executor of a copy plan.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kvcache/copy_plan.h"

namespace kvrelay {

// Copies and converts everything that a validated plan names; bases by RegionId. Returns when all
// bytes are stored, non-temporal stores fenced. Any thread; large copies use ParallelFor.
//
// On a machine with several nodes of memory each part of a large copy runs on processors of the
// node where its first byte lands (ParallelForNear). The destination's, not the source's: either
// way every byte crosses between the nodes once at least, but a load is asked for ahead and its
// latency hidden, while a store to the other node keeps its line, or its write-combining buffer, of
// which a core has a dozen, for the whole way there; and a store that goes through the caches reads
// its line over the same way first, and leaves it with processors that are far from where it is
// used next. No part asks where the others are: what is scattered over two nodes within a part
// (256 KiB to 4 MiB) goes with its first byte.
//
// The source may be another process's memory that is being overwritten meanwhile: the caller reads
// the lease record before and after and throws the bytes away when it changed (an optimistic read).
// It is the one function in the project that is allowed to race, and is annotated so.
//
// What is large (4 MiB) is stored around the caches, where it is not read again soon.
// `whole_bytes`: of the copy that this plan is a part of, where that is more than the plan itself.
void ExecuteCopy(const CopyPlan& plan, std::span<const std::byte* const> src_regions,
                 std::span<std::byte* const> dst_regions, uint64_t whole_bytes = 0);

// A part of it: from byte `position` of the plan (0, or what the call before returned) on, at most
// `max_bytes` but at least one run or piece of a long run (some 256 KiB). Returns the position
// behind it; plan.bytes() when all is done.
uint64_t ExecuteCopyPart(const CopyPlan& plan, uint64_t position, uint64_t max_bytes,
                         std::span<const std::byte* const> src_regions,
                         std::span<std::byte* const> dst_regions);

}  // namespace kvrelay
