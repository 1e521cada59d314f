// The attention kernel: one CTA per multiprocessor, three producer warps and two warpgroups of
// consumers, until all work of the plan is done.
#pragma once

#include "attention/cuda/attend_prefix.cuh"
#include "attention/cuda/attend_suffix.cuh"
#include "attention/cuda/produce.cuh"

namespace kvrelay::attention::cuda {

template <typename T, uint32_t kHeadDim, uint32_t kQueryTiles>
__device__ void Consume(Shared<kHeadDim>& shared, const AttendArgs& args) {
  using S = Shared<kHeadDim>;
  Consumer<kHeadDim> consumer(shared, args);
  RingPosition<S::kWorkSlots> position;
  uint32_t turn = 0;  // the warp that takes the next suffix item
  while (true) {
    ptx::Wait(ptx::SharedAddress(&shared.work_full[position.slot]), position.parity);
    const Work& work = shared.work[position.slot];
    if (work.kind == WorkKind::kStop) break;
    if (work.kind == WorkKind::kPrefix) {
      PrefixAttention<T, kHeadDim>(consumer, work.prefix).Run();
    } else {
      if (consumer.warp != turn) {
        consumer.ring.Skip(2 * CeilDiv(work.suffix.end - work.suffix.begin, kTileTokens));
      } else {
        SuffixAttention<T, kHeadDim, kQueryTiles>(consumer, work.suffix, work.q_slot).Run();
      }
      turn = (turn + 1) % kConsumerWarps;
    }
    __syncwarp();
    if (consumer.lane == 0) ptx::Arrive(ptx::SharedAddress(&shared.work_empty[position.slot]));
    position.Next();
  }
  MergeParts<T, kHeadDim>(args, consumer.warp * gridDim.x + blockIdx.x, kConsumerWarps * gridDim.x);
}

// kQueryTiles: tiles of 8 query heads that a head has.
template <typename T, uint32_t kHeadDim, uint32_t kQueryTiles>
__global__ void __launch_bounds__(kCtaThreads, 1)
    AttendKernel(const __grid_constant__ CacheMaps maps, const __grid_constant__ AttendArgs args) {
  using S = Shared<kHeadDim>;
  extern __shared__ __align__(1024) uint8_t memory[];
  S& shared = *reinterpret_cast<S*>(memory);
  WorkProducer<kHeadDim> work_producer(shared, args, maps);
  if (threadIdx.x < 32) {
    work_producer.Fetch();
  } else if (threadIdx.x == kCtaThreads - kConsumerThreads) {
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
    for (uint32_t i = 0; i < kConsumerWarps; ++i) {
      ptx::BarrierInit(ptx::SharedAddress(&shared.turns[i]), 1);
      ptx::BarrierInit(ptx::SharedAddress(&shared.releases[i]), 1);
    }
    ptx::FenceBarrierInit();
    ptx::Arrive(ptx::SharedAddress(&shared.turns[0]));
    ptx::Arrive(ptx::SharedAddress(&shared.releases[0]));
  }
  __syncthreads();
  if (threadIdx.x < kCtaThreads - kConsumerThreads) {
    ptx::RegistersDown<40>();
    if (threadIdx.x < 32) {
      work_producer.Run();
    } else if (threadIdx.x < 64) {
      TileProducer<kHeadDim, true>(shared, args, maps).Run();
    } else if (threadIdx.x < 96) {
      TileProducer<kHeadDim, false>(shared, args, maps).Run();
    }
  } else {
    ptx::RegistersUp<232>();
    Consume<T, kHeadDim, kQueryTiles>(shared, args);
  }
}

}  // namespace kvrelay::attention::cuda
