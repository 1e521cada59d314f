// What tensor-parallel ranks add up, on GPUs of one process: each reads the others' parts where
// they lie, on its own GPU or over peers' memory.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "engine/cuda/cuda_memory.h"
#include "engine/tp_group.h"

namespace kvrelay::engine::cuda {

// Shared by the ranks of `group`, which outlives it. Calls inside TpGroup::Run, each rank with its
// device current.
class RankSum {
 public:
  // `ordinals` by rank. kIncompatible names two GPUs that cannot read each other's memory.
  static Result<std::shared_ptr<RankSum>> Create(TpGroup& group, std::span<const int> ordinals);

  // Once, by every rank: room for parts of `count` numbers.
  Status Join(uint32_t rank, size_t count);
  // Begins a step: whatever a failed one left is forgotten. Nothing of the rank's is under way.
  void Begin(uint32_t rank) { ranks_[rank].turn = 0; }
  // Where the rank's stream writes its next part; Add sends it.
  float* part(uint32_t rank) const { return ranks_[rank].parts[ranks_[rank].turn].get(); }
  // x += all ranks' parts of `count` numbers, in the order of the ranks: equal bits on all.
  // Enqueues; the host waits only for the other ranks' threads.
  Status Add(uint32_t rank, size_t count, float* x, cudaStream_t stream);

 private:
  // Parts in turns: the next one is written while slower ranks still read this one.
  struct Rank {
    std::array<DeviceBuffer<float>, 2> parts;
    std::array<Event, 2> written;
    uint32_t turn = 0;
  };
  explicit RankSum(TpGroup& group) : group_(group), ranks_(group.size()) {}

  TpGroup& group_;
  std::vector<Rank> ranks_;
};

}  // namespace kvrelay::engine::cuda
