// What both kinds of consumer work share: position in the ring, and handing finished parts on.
#pragma once

#include "attention/cuda/attend_args.h"
#include "attention/cuda/merge_row.cuh"
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

  __device__ Consumer(S& shared_memory, const AttendArgs& launch)
      : shared(shared_memory),
        args(launch),
        thread(threadIdx.x - (kCtaThreads - kConsumerThreads)),
        warp(thread / 32),
        lane(thread % 32) {}

  __device__ __forceinline__ void WaitFull(uint32_t slot, uint32_t parity) const {
    ptx::Wait(ptx::SharedAddress(&shared.full[slot]), parity);
  }
  // The calling warp has read the stage. Every warp says so for every stage.
  __device__ __forceinline__ void Release(uint32_t slot) const {
    __syncwarp();
    if (lane == 0) ptx::Arrive(ptx::SharedAddress(&shared.empty[slot]));
  }
  __device__ __forceinline__ void Sync() const {
    ptx::NamedBarrier(kConsumersBarrier, kConsumerThreads);
  }

  // Counts a part of (request, head) as here, after the parts were written and fenced by all
  // threads. True for whoever brought the last one; the count is zero again then.
  __device__ bool ArrivePart(uint32_t request, uint32_t head, uint32_t contributions) const {
    uint32_t* count = &args.plan.contributions[request * args.shape.heads + head];
    if (atomicAdd(count, 1) != contributions - 1) return false;
    *count = 0;
    __threadfence();
    return true;
  }
};

}  // namespace kvrelay::attention::cuda
