// What bench_transport pulls: slices that lie scattered on both sides and cannot merge.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "kvcache/copy_plan.h"
#include "transport/transport.h"

namespace kvrelay::bench {

// Numbers of slices.
struct BlockPair {
  uint32_t src = 0;
  uint32_t dst = 0;
};

// Where slice i lies on the owner's and on the reader's side; the same in both processes.
inline std::vector<BlockPair> Scatter(uint64_t region_bytes, uint64_t slice, uint64_t bytes) {
  std::vector<uint32_t> from(region_bytes / slice);
  std::iota(from.begin(), from.end(), 0);
  std::vector<uint32_t> to = from;
  std::mt19937_64 random(slice);
  std::shuffle(from.begin(), from.end(), random);
  std::shuffle(to.begin(), to.end(), random);
  std::vector<BlockPair> pairs(bytes / slice);
  for (size_t i = 0; i < pairs.size(); ++i) pairs[i] = {from[i], to[i]};
  return pairs;
}

inline CopyPlan PlanOf(const std::vector<BlockPair>& pairs, uint64_t slice) {
  CopyPlan plan;
  plan.boxes.resize(1);
  plan.boxes[0].run_bytes = slice;
  plan.boxes[0].num_segments = static_cast<uint32_t>(pairs.size());
  plan.places.resize(1);
  for (const BlockPair& pair : pairs) plan.segments.push_back({pair.src * slice, pair.dst * slice});
  return plan;
}

// The same as a packed stream; `pack` on the owner's side.
inline transport::StreamPlan StreamOf(std::vector<BlockPair> pairs, uint64_t slice,
                                      uint64_t chunk_bytes, bool pack) {
  const uint64_t per_chunk = chunk_bytes / slice;
  const auto chunks = static_cast<uint32_t>((pairs.size() + per_chunk - 1) / per_chunk);
  return {chunks, chunk_bytes,
          [pairs = std::move(pairs), slice, per_chunk, pack](uint32_t chunk) -> Result<CopyPlan> {
            const size_t begin = chunk * per_chunk;
            const size_t end = std::min(pairs.size(), begin + per_chunk);
            std::vector<BlockPair> part(pairs.begin() + static_cast<ptrdiff_t>(begin),
                                        pairs.begin() + static_cast<ptrdiff_t>(end));
            for (uint32_t i = 0; i < part.size(); ++i) (pack ? part[i].dst : part[i].src) = i;
            return PlanOf(part, slice);
          }};
}

}  // namespace kvrelay::bench
