// Boxes that cast, bit for bit as kvcache/convert.h says.
#include "kvcache/convert.h"
#include "kvcache/cuda/gather_address.cuh"
#include "kvcache/cuda/gather_launch.h"

namespace kvrelay::cuda {
namespace {

constexpr uint32_t kCastLoads = 2;  // of a thread at a time, up to 32 bytes each

// The bytes of up to kCastElements elements.
struct alignas(16) UnitBytes {
  uint32_t words[kCastElements];
};

// In the widest pieces that the unit's own size allows: units are aligned to them.
__device__ __forceinline__ void Load(UnitBytes& unit, uint64_t from, uint32_t bytes) {
  if (bytes >= 16) {
    for (uint32_t i = 0; i < 2; ++i) {
      if (16 * i < bytes) {
        reinterpret_cast<uint4*>(&unit)[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
      }
    }
  } else {
    *reinterpret_cast<uint2*>(&unit) = __ldcs(reinterpret_cast<const uint2*>(from));
  }
}
__device__ __forceinline__ void Store(uint64_t to, const UnitBytes& unit, uint32_t bytes) {
  if (bytes >= 16) {
    for (uint32_t i = 0; i < 2; ++i) {
      if (16 * i < bytes) {
        __stcs(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(&unit)[i]);
      }
    }
  } else {
    __stcs(reinterpret_cast<uint2*>(to), *reinterpret_cast<const uint2*>(&unit));
  }
}

// Element i of packed ones of kSize bytes.
template <uint32_t kSize>
__device__ __forceinline__ uint32_t Get(const UnitBytes& unit, uint32_t i) {
  const uint32_t word = unit.words[i * kSize / 4] >> (i * kSize % 4 * 8);
  return kSize == 4 ? word : word & ((1U << (kSize * 8 % 32)) - 1);
}
template <uint32_t kSize>
__device__ __forceinline__ void Put(UnitBytes& unit, uint32_t i, uint32_t bits) {
  const uint32_t at = i * kSize % 4 * 8;
  uint32_t& word = unit.words[i * kSize / 4];
  word = at == 0 ? bits : word | bits << at;
}

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

__device__ __forceinline__ void Convert(UnitBytes& unit, DType from, DType to, float factor) {
  float values[kCastElements];
  WithDeviceNumber(from, [&](auto number) {
    using Number = decltype(number);
#pragma unroll
    for (uint32_t i = 0; i < kCastElements; ++i) {
      const auto bits =
          static_cast<typename Number::Bits>(Get<sizeof(typename Number::Bits)>(unit, i));
      values[i] = __fmul_rn(Number::ToFloat(bits), factor);
    }
  });
  WithDeviceNumber(to, [&](auto number) {
    using Number = decltype(number);
#pragma unroll
    for (uint32_t i = 0; i < kCastElements; ++i) {
      Put<sizeof(typename Number::Bits)>(unit, i, Number::FromFloat(values[i]));
    }
  });
}

// Runs that are no whole units, or begin anywhere: one element, byte by byte.
__device__ __forceinline__ void CastElement(const GatherBox& box, const UnitAddress& at,
                                            float factor) {
  UnitBytes unit = {};
  for (uint32_t i = 0; i < box.src_unit; ++i) {
    unit.words[0] |= uint32_t{reinterpret_cast<const uint8_t*>(at.src)[i]} << (8 * i);
  }
  Convert(unit, box.from, box.to, factor);
  for (uint32_t i = 0; i < box.dst_unit; ++i) {
    reinterpret_cast<uint8_t*>(at.dst)[i] = static_cast<uint8_t>(unit.words[0] >> (8 * i));
  }
}

__device__ __forceinline__ void CastChunk(const GatherArgs& args, const GatherBox& box,
                                          uint32_t chunk) {
  UnitAddress at[kCastLoads];
  AnyShape::LocateChunk(args, box, box.src_unit, box.dst_unit, chunk, at);
  UnitBytes units[kCastLoads];
#pragma unroll
  for (uint32_t k = 0; k < kCastLoads; ++k) {
    if (at[k].dst != 0) Load(units[k], at[k].src, box.src_unit);
  }
#pragma unroll
  for (uint32_t k = 0; k < kCastLoads; ++k) {
    if (at[k].dst == 0) continue;
    Convert(units[k], box.from, box.to, __ldg(args.factors + at[k].factor));
    Store(at[k].dst, units[k], box.dst_unit);
  }
}

__global__ void __launch_bounds__(kGatherThreads, 1)
    GatherCastKernel(const __grid_constant__ GatherArgs args) {
  uint32_t chunk = blockIdx.x;
  for (uint32_t b = 0; b < args.boxes; ++b) {
    const GatherBox& box = args.box[b];
    for (; chunk < box.end_chunk; chunk += gridDim.x) {
      if (box.src_unit >= kCastElements) {
        CastChunk(args, box, chunk);
        continue;
      }
      UnitAddress at[kCastLoads];
      AnyShape::LocateChunk(args, box, box.src_unit, box.dst_unit, chunk, at);
      for (uint32_t k = 0; k < kCastLoads; ++k) {
        if (at[k].dst != 0) CastElement(box, at[k], __ldg(args.factors + at[k].factor));
      }
    }
  }
}

}  // namespace

cudaError_t LaunchGatherCast(const GatherArgs& args, cudaStream_t stream) {
  GatherCastKernel<<<args.ctas, kGatherThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace kvrelay::cuda
