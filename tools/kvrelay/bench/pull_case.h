// What the pull benchmarks move: slices of a known pattern, scattered on both sides so that no two
// merge.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kvcache/copy_plan.h"
#include "transport/transport.h"

namespace kvrelay::tools {

// One pull: where its slices lie, in bytes from the start of the owner's and of the reader's
// memory. A value of a few numbers: every process that makes it gets the same.
struct PullCase {
  // Sets of slices that have nothing in common: pulls that take them in turn find little in caches.
  static constexpr uint32_t kSets = 2;

  uint64_t memory_bytes = 0;  // of either side
  uint64_t slice_bytes = 0;   // a multiple of 8
  uint32_t set = 0;
  uint64_t count = 0;  // at most MaxCount
  std::vector<CopySegment> slices = {};

  static uint64_t MaxCount(uint64_t memory_bytes, uint64_t slice_bytes) {
    return memory_bytes / slice_bytes / kSets;
  }
  static PullCase Make(uint64_t memory_bytes, uint64_t slice_bytes, uint32_t set, uint64_t count);

  uint64_t bytes() const { return slice_bytes * count; }
  CopyPlan Plan() const;
  // The same in chunks for a packed stream: of the owner, which packs, or of the reader.
  transport::StreamPlan Stream(uint64_t chunk_bytes, bool pack) const;
};

// Words of 8 bytes that tell where they come from.
void FillPattern(std::span<std::byte> memory);
// Whether the reader's memory holds the pattern of the owner's in every slice.
bool HoldsPattern(const PullCase& pull, std::span<const std::byte> memory);
// Overwrites the slices in the reader's memory.
void Erase(const PullCase& pull, std::span<std::byte> memory);

}  // namespace kvrelay::tools
