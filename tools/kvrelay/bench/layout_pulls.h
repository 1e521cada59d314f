// Pulls between caches that differ, beside the pull of the same bytes between equal ones.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "tools/kvrelay/bench/pull_way.h"

namespace kvrelay::tools {

struct LayoutPull {
  std::string name;             // "TP4 to TP1"
  std::vector<CopyPlan> plans;  // one per owner rank
  uint64_t read_bytes = 0;      // of the owner's memory, all plans
  uint64_t slices = 0;          // all plans
};

// The plain one first: bf16, NHD, blocks of 16, one rank, as many tokens as fit into half of
// `memory_bytes` on either side, at scattered blocks. All others read the same bytes.
// kInvalidArgument when not even a block fits.
Result<std::vector<LayoutPull>> MakeLayoutPulls(uint64_t memory_bytes);

// Whether every run of the plans is in the reader's memory as the owner's pattern wants it.
bool HoldsLayoutPull(const LayoutPull& pull, uint64_t memory_bytes,
                     std::span<const std::byte> memory);

}  // namespace kvrelay::tools
