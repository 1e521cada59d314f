// The attention kernel: one CTA per multiprocessor, three producer warps and two warpgroups of
// consumers, until all work of the plan is done.
#pragma once

#include "attention/cuda/attend_prefix.cuh"
#include "attention/cuda/attend_suffix.cuh"
#include "attention/cuda/produce.cuh"

namespace kvrelay::attention::cuda {

// The last CTA leaves the counters as the next launch needs them.
__device__ __forceinline__ void LeavePlan(PlanHeader& header) {
  __threadfence();
  if (atomicAdd(&header.finished_ctas, 1) != gridDim.x - 1) return;
  header.next_piece = 0;
  header.next_suffix = 0;
  header.next_merge = 0;
  header.finished_ctas = 0;
  ++header.runs;
}

template <typename T, uint32_t kHeadDim>
__device__ void Consume(Shared<kHeadDim>& shared, const AttendArgs& args) {
  using S = Shared<kHeadDim>;
  Consumer<kHeadDim> consumer(shared, args);
  RingPosition<S::kWorkSlots> position;
  while (true) {
    ptx::Wait(ptx::SharedAddress(&shared.work_full[position.slot]), position.parity);
    const Work& work = shared.work[position.slot];
    if (work.kind == WorkKind::kStop) break;
    if (work.kind == WorkKind::kPrefix) {
      PrefixAttention<T, kHeadDim>(consumer, work.prefix).Run();
    } else if (args.shape.group <= 8) {
      SuffixAttention<T, kHeadDim, 1>(consumer, work.suffix, work.q_slot).Run();
    } else {
      SuffixAttention<T, kHeadDim, 2>(consumer, work.suffix, work.q_slot).Run();
    }
    __syncwarp();
    if (consumer.lane == 0) ptx::Arrive(ptx::SharedAddress(&shared.work_empty[position.slot]));
    position.Next();
  }
  MergeParts<T, kHeadDim>(args);
  consumer.Sync();
  if (consumer.thread == 0) LeavePlan(*args.plan.header);
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
      ptx::BarrierInit(ptx::SharedAddress(&shared.work_empty[i]), kWorkReaders);
    }
    ptx::FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x < kCtaThreads - kConsumerThreads) {
    ptx::RegistersDown<40>();
    if (threadIdx.x < 32) {
      WorkProducer<kHeadDim>(shared, args, maps).Run();
    } else if (threadIdx.x < 64) {
      TileProducer<kHeadDim, true>(shared, args, maps).Run();
    } else if (threadIdx.x < 96) {
      TileProducer<kHeadDim, false>(shared, args, maps).Run();
    }
  } else {
    ptx::RegistersUp<232>();
    Consume<T, kHeadDim>(shared, args);
  }
}

}  // namespace kvrelay::attention::cuda
