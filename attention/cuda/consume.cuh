// What both kinds of consumer work share: position in the ring, and saying that parts are written.
#pragma once

#include "attention/cuda/attend_args.h"
#include "attention/cuda/merge.cuh"
#include "attention/cuda/ptx.h"
#include "attention/cuda/shared.h"

namespace kvrelay::attention::cuda {

template <uint32_t kHeadDim>
struct Consumer {
  using S = Shared<kHeadDim>;

  S& shared;
  const AttendArgs& args;
  const uint32_t thread;  // among the consumers
  const uint32_t warp;
  const uint32_t lane;
  RingPosition<S::kStages> ring;
  uint32_t turn_parity = 0;

  __device__ Consumer(S& shared_memory, const AttendArgs& launch)
      : shared(shared_memory),
        args(launch),
        thread(threadIdx.x - (kCtaThreads - kConsumerThreads)),
        warp(thread / 32),
        lane(thread % 32) {}

  __device__ __forceinline__ void WaitFull(uint32_t slot, uint32_t parity) const {
    ptx::Wait(ptx::SharedAddress(&shared.full[slot]), parity);
  }
  // The calling warp has read the stage; every warp says so.
  __device__ __forceinline__ void Release(uint32_t slot) const {
    __syncwarp();
    if (lane == 0) ptx::Arrive(ptx::SharedAddress(&shared.empty[slot]));
  }
  // The same of a stage that only this warp reads.
  __device__ __forceinline__ void ReleaseAlone(uint32_t slot) const {
    __syncwarp();
    if (lane == 0) ptx::ArriveFor(ptx::SharedAddress(&shared.empty[slot]), kConsumerWarps);
  }
  // Suffix items are begun in turns, once all stages before an item's are full, and their stages
  // released in turns: a barrier only tells even passes of the ring from odd ones, so that nobody
  // may look at one a pass too early.
  __device__ __forceinline__ void WaitTurn() const {
    ptx::Wait(ptx::SharedAddress(&shared.turns[warp]), turn_parity);
  }
  __device__ __forceinline__ void PassTurn() const { Pass(shared.turns); }
  __device__ __forceinline__ void WaitReleases() const {
    ptx::Wait(ptx::SharedAddress(&shared.releases[warp]), turn_parity);
  }
  __device__ __forceinline__ void PassReleases() {
    Pass(shared.releases);
    turn_parity ^= 1;
  }
  __device__ __forceinline__ void Sync() const {
    ptx::NamedBarrier(kConsumersBarrier, kConsumerThreads);
  }

  __device__ __forceinline__ void Pass(uint64_t (&to)[kConsumerWarps]) const {
    if (lane == 0) ptx::Arrive(ptx::SharedAddress(&to[(warp + 1) % kConsumerWarps]));
  }

  // Says that one more part of (request, head) is written, by threads that have met since.
  __device__ __forceinline__ void PartWritten(uint32_t request, uint32_t head) const {
    ptx::AddRelease(&args.plan.contributions[request * args.shape.heads + head], 1);
  }
};

}  // namespace kvrelay::attention::cuda
