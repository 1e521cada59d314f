// Boxes that copy.
#include "kvcache/cuda/gather_address.cuh"
#include "kvcache/cuda/gather_launch.h"

namespace kvrelay::cuda {
namespace {

// Past L1 on the way in: every byte is read once. First to leave L2 on the way out.
__device__ __forceinline__ void Load(uint4& value, uint64_t from) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
}
__device__ __forceinline__ void Load(uint2& value, uint64_t from) {
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(from));
}
__device__ __forceinline__ void Load(uint32_t& value, uint64_t from) {
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(from));
}
__device__ __forceinline__ void Load(uint16_t& value, uint64_t from) {
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(value) : "l"(from));
}
__device__ __forceinline__ void Load(uint8_t& value, uint64_t from) {
  uint32_t wide;
  asm volatile("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=r"(wide) : "l"(from));
  value = static_cast<uint8_t>(wide);
}
template <typename Unit>
__device__ __forceinline__ void Store(uint64_t to, Unit value) {
  __stcs(reinterpret_cast<Unit*>(to), value);
}

// This CTA's chunks from `chunk` to `end`, all of one box; returns its first chunk behind them. The
// next chunk's addresses are worked out while this one's loads are under way.
template <typename Unit, typename BoxShape>
__device__ __forceinline__ uint32_t CopyChunks(const GatherArgs& args, const GatherTables& tables,
                                               const GatherBox& box, uint32_t chunk, uint32_t end) {
  UnitAddress now[kMaxLoads];
  BoxShape::LocateChunk(args, tables, box, sizeof(Unit), sizeof(Unit), chunk, now);
  while (true) {
    Unit values[kMaxLoads];
#pragma unroll
    for (uint32_t k = 0; k < kMaxLoads; ++k) {
      if (now[k].dst != 0) Load(values[k], now[k].src);
    }
    chunk += gridDim.x;
    UnitAddress next[kMaxLoads];
    if (chunk < end) {
      BoxShape::LocateChunk(args, tables, box, sizeof(Unit), sizeof(Unit), chunk, next);
    }
#pragma unroll
    for (uint32_t k = 0; k < kMaxLoads; ++k) {
      if (now[k].dst != 0) Store(now[k].dst, values[k]);
    }
    if (chunk >= end) return chunk;
#pragma unroll
    for (uint32_t k = 0; k < kMaxLoads; ++k) now[k] = next[k];
  }
}

__device__ __forceinline__ uint32_t CopyAnyBox(const GatherArgs& args, const GatherTables& tables,
                                               const GatherBox& box, uint32_t chunk, uint32_t end) {
  switch (box.src_unit) {
    case 16:
      return CopyChunks<uint4, AnyShape>(args, tables, box, chunk, end);
    case 8:
      return CopyChunks<uint2, AnyShape>(args, tables, box, chunk, end);
    case 4:
      return CopyChunks<uint32_t, AnyShape>(args, tables, box, chunk, end);
    case 2:
      return CopyChunks<uint16_t, AnyShape>(args, tables, box, chunk, end);
    default:
      return CopyChunks<uint8_t, AnyShape>(args, tables, box, chunk, end);
  }
}

// The first box is the largest: its index is known to the compiler, which makes its fields operands
// of instructions.
template <uint32_t kTableBytes>
__global__ void __launch_bounds__(kGatherThreads, 1)
    GatherCopyKernel(const __grid_constant__ GatherArgs args,
                     const __grid_constant__ InlineTables<kTableBytes> inlined) {
  const GatherTables tables = StageTables(args, inlined);
  uint32_t chunk = blockIdx.x;
  uint32_t b = 0;
  if (args.box[0].src_unit == 16 && args.box[0].narrow_strides) {
    const uint32_t end = args.box[0].end_chunk;
    if (chunk < end) {
      chunk = args.box[0].outer.divisor == 1
                  ? CopyChunks<uint4, Shape<false, false>>(args, tables, args.box[0], chunk, end)
                  : CopyChunks<uint4, Shape<true, false>>(args, tables, args.box[0], chunk, end);
    }
    b = 1;
  }
  for (; b < args.boxes; ++b) {
    const GatherBox& box = args.box[b];
    if (chunk < box.end_chunk) chunk = CopyAnyBox(args, tables, box, chunk, box.end_chunk);
  }
  SayEnd(args);
}

}  // namespace

cudaError_t LaunchGatherCopy(const GatherArgs& args, std::span<const std::byte> inlined,
                             cudaStream_t stream) {
  switch (inlined.size()) {
    case kFewTables:
      return LaunchGather(GatherCopyKernel<kFewTables>, args, inlined, stream);
    case kManyTables:
      return LaunchGather(GatherCopyKernel<kManyTables>, args, inlined, stream);
    default:
      return LaunchGather(GatherCopyKernel<0>, args, inlined, stream);
  }
}

}  // namespace kvrelay::cuda
