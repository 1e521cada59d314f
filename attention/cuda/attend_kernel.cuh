// The attention kernel: one CTA per multiprocessor, a producer warp and two warpgroups of
// consumers, until all work of the plan is done. No CTA waits for another.
#pragma once

#include "attention/cuda/attend_prefix.cuh"
#include "attention/cuda/attend_suffix.cuh"
#include "attention/cuda/produce.cuh"

namespace kvrelay::attention::cuda {

template <typename T, uint32_t kHeadDim>
__device__ void Consume(Shared<kHeadDim>& shared, const AttendArgs& args) {
  using S = Shared<kHeadDim>;
  Consumer<kHeadDim> consumer(shared, args);
  RingPosition<S::kWorkSlots> position;
  while (true) {
    ptx::Wait(ptx::SharedAddress(&shared.work_full[position.slot]), position.parity);
    const Work& work = shared.work[position.slot];
    if (work.kind == WorkKind::kStop) return;
    if (work.kind == WorkKind::kPrefix) {
      PrefixAttention<T, kHeadDim>(consumer, work).Run();
    } else if (args.shape.group <= 8) {
      SuffixAttention<T, kHeadDim, 1>(consumer, work).Run();
    } else {
      SuffixAttention<T, kHeadDim, 2>(consumer, work).Run();
    }
    __syncwarp();
    if (consumer.lane == 0) ptx::Arrive(ptx::SharedAddress(&shared.work_empty[position.slot]));
    position.Next();
  }
}

template <typename T, uint32_t kHeadDim>
__global__ void __launch_bounds__(kCtaThreads, 1)
    AttendKernel(const __grid_constant__ CacheMaps maps, const __grid_constant__ AttendArgs args) {
  using S = Shared<kHeadDim>;
  extern __shared__ __align__(1024) uint8_t memory[];
  S& shared = *reinterpret_cast<S*>(memory);
  if (threadIdx.x == 0) {
    ptx::PrefetchMap(&maps.k);
    ptx::PrefetchMap(&maps.v);
    for (uint32_t i = 0; i < S::kStages; ++i) {
      ptx::BarrierInit(ptx::SharedAddress(&shared.full[i]), 1);
      ptx::BarrierInit(ptx::SharedAddress(&shared.empty[i]), kConsumerWarps);
    }
    for (uint32_t i = 0; i < S::kWorkSlots; ++i) {
      ptx::BarrierInit(ptx::SharedAddress(&shared.work_full[i]), 1);
      ptx::BarrierInit(ptx::SharedAddress(&shared.work_empty[i]), kConsumerWarps);
    }
    ptx::FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x < kCtaThreads - kConsumerThreads) {
    ptx::RegistersDown<40>();
    if (threadIdx.x < 32) Producer<kHeadDim>(shared, args, maps).Run();
  } else {
    ptx::RegistersUp<232>();
    Consume<T, kHeadDim>(shared, args);
  }
}

}  // namespace kvrelay::attention::cuda
