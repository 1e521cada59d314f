// From units to addresses.
#pragma once

#include <cstddef>
#include <type_traits>

#include "kvcache/cuda/gather_args.h"

namespace kvrelay::cuda {

__device__ __forceinline__ uint32_t Divide(uint32_t n, const Divisor& by) {
  return __umulhi(n << 1, by.multiplier) >> by.shift;
}

// Takes the innermost of the dimensions left off `index` and returns the position in it.
__device__ __forceinline__ uint32_t Pop(uint32_t& index, const Divisor& count) {
  const uint32_t rest = Divide(index, count);
  const uint32_t position = index - rest * count.divisor;
  index = rest;
  return position;
}

// Where this CTA finds the tables: those that are an argument in its shared memory, where threads
// that read different entries do not wait for each other. All of its threads.
template <uint32_t kBytes>
__device__ __forceinline__ GatherTables StageTables(const GatherArgs& args,
                                                    const InlineTables<kBytes>& tables) {
  if constexpr (kBytes == 0) {
    return args.tables;
  } else {
    __shared__ uint4 staged[kBytes / sizeof(uint4)];
    for (uint32_t i = threadIdx.x; i < args.table_bytes / sizeof(uint4); i += kGatherThreads) {
      staged[i] = tables.words[i];
    }
    __syncthreads();
    const auto at = [&](const auto*& table) {
      using Entry = std::remove_reference_t<decltype(*table)>;
      return reinterpret_cast<Entry*>(reinterpret_cast<const std::byte*>(staged) +
                                      reinterpret_cast<uintptr_t>(table));
    };
    GatherTables here = args.tables;
    return {at(here.segments), at(here.places), at(here.factors)};
  }
}

// The last thing that all threads do. What a CTA wrote is before its arrival, all arrivals are
// before the word.
__device__ __forceinline__ void SayEnd(const GatherArgs& args) {
  if (args.end.word == nullptr) return;
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence_system();
  if (atomicAdd(args.end.arrived, 1) + 1 < gridDim.x) return;
  *args.end.arrived = 0;
  __threadfence_system();
  *static_cast<volatile uint32_t*>(args.end.word) = args.end.value;
}

// One unit of a thread.
struct UnitAddress {
  uint64_t src;
  uint64_t dst;     // 0: there is no such unit
  uint32_t factor;  // of a box that casts
};

// Boxes of one shape, so that what the shape makes needless costs no instruction.
template <bool kHasOuter, bool kWideStrides>
struct Shape {
  static __device__ __forceinline__ uint64_t Offset(uint32_t index, uint64_t stride) {
    if constexpr (kWideStrides) return index * stride;
    return uint64_t{index} * static_cast<uint32_t>(stride);
  }

  // Unit `index` of the box, or none when it is not below `end`.
  static __device__ __forceinline__ UnitAddress Locate(const GatherTables& tables,
                                                       const GatherBox& box, uint32_t src_unit,
                                                       uint32_t dst_unit, uint32_t index,
                                                       uint32_t end) {
    if (index >= end) return {};
    const uint32_t in_run = Pop(index, box.run_units);
    const uint32_t j = Pop(index, box.inner);
    const uint32_t i = kHasOuter ? Pop(index, box.outer) : 0;
    const uint32_t s = Pop(index, box.segments);
    const ulonglong2 segment =
        *reinterpret_cast<const ulonglong2*>(tables.segments + box.first_segment + s);
    const ulonglong2 place =
        *reinterpret_cast<const ulonglong2*>(tables.places + box.first_place + index);
    UnitAddress unit = {segment.x + place.x, segment.y + place.y, box.first_factor};
    unit.src += Offset(in_run, src_unit) + Offset(j, box.inner_stride.src);
    unit.dst += Offset(in_run, dst_unit) + Offset(j, box.inner_stride.dst);
    unit.factor += j * box.inner_step + index * box.place_step;
    if constexpr (kHasOuter) {
      unit.src += Offset(i, box.outer_stride.src);
      unit.dst += Offset(i, box.outer_stride.dst);
      unit.factor += i * box.outer_step;
    }
    return unit;
  }

  // A thread's units of a chunk.
  template <uint32_t kLoads>
  static __device__ __forceinline__ void LocateChunk(const GatherArgs& args,
                                                     const GatherTables& tables,
                                                     const GatherBox& box, uint32_t src_unit,
                                                     uint32_t dst_unit, uint32_t chunk,
                                                     UnitAddress (&units)[kLoads]) {
    const uint32_t first = (chunk - box.first_chunk) * args.chunk_units;
    const uint32_t end = min(box.units, first + args.chunk_units);
#pragma unroll
    for (uint32_t k = 0; k < kLoads; ++k) {
      units[k] =
          Locate(tables, box, src_unit, dst_unit, first + k * kGatherThreads + threadIdx.x, end);
    }
  }
};
using AnyShape = Shape<true, true>;

}  // namespace kvrelay::cuda
