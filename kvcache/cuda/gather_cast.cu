// Boxes that cast.
#include "kvcache/cuda/cast_unit.cuh"
#include "kvcache/cuda/gather_address.cuh"
#include "kvcache/cuda/gather_launch.h"

namespace kvrelay::cuda {
namespace {

// WithNumber (kvcache/convert.h) on the device.
template <typename Fn>
__device__ __forceinline__ void WithDeviceNumber(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFp32:
      return fn(Fp32());
    case DType::kFp16:
      return fn(Fp16());
    case DType::kBf16:
      return fn(Bf16());
    case DType::kFp8E4m3:
      return fn(Fp8E4m3());
    case DType::kFp8E5m2:
      return fn(Fp8E5m2());
    case DType::kInt8:
      return fn(Int8());
  }
}

// In pieces of 16 bytes, or 8.
template <uint32_t kBytes>
__device__ __forceinline__ UnitBytes<kBytes> Load(uint64_t from) {
  using Piece = std::conditional_t<kBytes == 8, uint2, uint4>;
  UnitBytes<kBytes> unit;
#pragma unroll
  for (uint32_t i = 0; i < kBytes / sizeof(Piece); ++i) {
    reinterpret_cast<Piece*>(&unit)[i] = __ldcs(reinterpret_cast<const Piece*>(from) + i);
  }
  return unit;
}
template <uint32_t kBytes>
__device__ __forceinline__ void Store(uint64_t to, const UnitBytes<kBytes>& unit) {
  using Piece = std::conditional_t<kBytes == 8, uint2, uint4>;
#pragma unroll
  for (uint32_t i = 0; i < kBytes / sizeof(Piece); ++i) {
    __stcs(reinterpret_cast<Piece*>(to) + i, reinterpret_cast<const Piece*>(&unit)[i]);
  }
}

// A chunk of units of kBytes bytes in the source.
template <uint32_t kBytes, typename BoxShape>
__device__ __forceinline__ void CastChunk(const GatherArgs& args, const GatherTables& tables,
                                          const GatherBox& box, uint32_t chunk) {
  constexpr uint32_t kLoads = CastLoads(kBytes);
  UnitAddress at[kLoads];
  BoxShape::LocateChunk(args, tables, box, kBytes, box.dst_unit, chunk, at);
  UnitBytes<kBytes> units[kLoads];
#pragma unroll
  for (uint32_t k = 0; k < kLoads; ++k) {
    if (at[k].dst != 0) units[k] = Load<kBytes>(at[k].src);
  }
#pragma unroll
  for (uint32_t k = 0; k < kLoads; ++k) {
    if (at[k].dst == 0) continue;
    float values[kCastElements];
    WithDeviceNumber(box.from, [&](auto number) {
      if constexpr (kUnitBytes<decltype(number)> == kBytes) {
        Unpack<decltype(number)>(units[k], values);
      }
    });
    const float factor = tables.factors[at[k].factor];
#pragma unroll
    for (float& value : values) value = __fmul_rn(value, factor);
    WithDeviceNumber(box.to,
                     [&](auto number) { Store(at[k].dst, Pack<decltype(number)>(values)); });
  }
}

// Runs that are no whole units, or begin anywhere: one element at a time, byte by byte.
__device__ __forceinline__ void CastElements(const GatherArgs& args, const GatherTables& tables,
                                             const GatherBox& box, uint32_t chunk) {
  UnitAddress at[kMaxLoads];
  AnyShape::LocateChunk(args, tables, box, box.src_unit, box.dst_unit, chunk, at);
#pragma unroll 1
  for (const UnitAddress& element : at) {
    if (element.dst == 0) continue;
    uint32_t bits = 0;
    for (uint32_t i = 0; i < box.src_unit; ++i) {
      bits |= uint32_t{reinterpret_cast<const uint8_t*>(element.src)[i]} << (8 * i);
    }
    float value = 0;
    WithDeviceNumber(box.from, [&](auto number) {
      value = number.ToFloat(static_cast<typename decltype(number)::Bits>(bits));
    });
    value = __fmul_rn(value, tables.factors[element.factor]);
    WithDeviceNumber(box.to, [&](auto number) { bits = number.FromFloat(value); });
    for (uint32_t i = 0; i < box.dst_unit; ++i) {
      reinterpret_cast<uint8_t*>(element.dst)[i] = static_cast<uint8_t>(bits >> (8 * i));
    }
  }
}

// This CTA's chunks of the box from `chunk` on; returns its first chunk behind them.
template <typename BoxShape>
__device__ __forceinline__ uint32_t CastBox(const GatherArgs& args, const GatherTables& tables,
                                            const GatherBox& box, uint32_t chunk) {
  for (; chunk < box.end_chunk; chunk += gridDim.x) {
    switch (box.src_unit) {
      case 8:
        CastChunk<8, BoxShape>(args, tables, box, chunk);
        break;
      case 16:
        CastChunk<16, BoxShape>(args, tables, box, chunk);
        break;
      case 32:
        CastChunk<32, BoxShape>(args, tables, box, chunk);
        break;
      default:
        CastElements(args, tables, box, chunk);
    }
  }
  return chunk;
}

// The first box is the largest, as in the kernel that copies.
template <uint32_t kTableBytes>
__global__ void __launch_bounds__(kGatherThreads, 1)
    GatherCastKernel(const __grid_constant__ GatherArgs args,
                     const __grid_constant__ InlineTables<kTableBytes> inlined) {
  const GatherTables tables = StageTables(args, inlined);
  uint32_t chunk = blockIdx.x;
  uint32_t b = 0;
  if (args.box[0].narrow_strides) {
    chunk = CastBox<Shape<true, false>>(args, tables, args.box[0], chunk);
    b = 1;
  }
  for (; b < args.boxes; ++b) chunk = CastBox<AnyShape>(args, tables, args.box[b], chunk);
  SayEnd(args);
}

}  // namespace

cudaError_t LaunchGatherCast(const GatherArgs& args, std::span<const std::byte> inlined,
                             cudaStream_t stream) {
  switch (inlined.size()) {
    case kFewTables:
      return LaunchGather(GatherCastKernel<kFewTables>, args, inlined, stream);
    case kManyTables:
      return LaunchGather(GatherCastKernel<kManyTables>, args, inlined, stream);
    default:
      return LaunchGather(GatherCastKernel<0>, args, inlined, stream);
  }
}

}  // namespace kvrelay::cuda
