// The elements of a unit, packed, to fp32 and back, bit for bit as kvcache/convert.h says (of a
// NaN: to be a NaN).
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

#include "kvcache/convert.h"
#include "kvcache/cuda/gather_args.h"

namespace kvrelay::cuda {

template <typename Number>
inline constexpr uint32_t kUnitBytes = kCastElements * sizeof(typename Number::Bits);

template <uint32_t kBytes>
struct alignas(kBytes < 16 ? kBytes : 16) UnitBytes {
  uint32_t words[kBytes / 4];
};

// The processor's own conversions of two elements, where it has them: several times as fast.
#if __CUDA_ARCH__ >= 890
inline constexpr bool kConvertsFp8 = true;
#else
inline constexpr bool kConvertsFp8 = false;
#endif

template <typename Number>
inline constexpr bool kIsPairOfFp8 = kConvertsFp8 && (std::is_same_v<Number, Fp8E4m3> ||
                                                      std::is_same_v<Number, Fp8E5m2>);

template <typename Number>
__device__ __forceinline__ float2 PairToFloat(uint16_t pair) {
  uint32_t halves = 0;
#if __CUDA_ARCH__ >= 890
  if constexpr (std::is_same_v<Number, Fp8E4m3>) {
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  } else {
    asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(halves) : "h"(pair));
  }
#endif
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}
template <typename Number>
__device__ __forceinline__ uint16_t PairFromFloat(float low, float high) {
  uint16_t pair = 0;
#if __CUDA_ARCH__ >= 890
  if constexpr (std::is_same_v<Number, Fp8E4m3>) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  }
#endif
  return pair;
}

template <typename Number>
__device__ __forceinline__ void Unpack(const UnitBytes<kUnitBytes<Number>>& unit,
                                       float (&values)[kCastElements]) {
  constexpr uint32_t kSize = sizeof(typename Number::Bits);
#pragma unroll
  for (uint32_t i = 0; i < kCastElements; i += 2) {
    const auto bits = [&](uint32_t at) {
      return static_cast<typename Number::Bits>(unit.words[at * kSize / 4] >> (at * kSize % 4 * 8));
    };
    if constexpr (kIsPairOfFp8<Number>) {
      const float2 pair =
          PairToFloat<Number>(static_cast<uint16_t>(unit.words[i / 4] >> (i % 4 * 8)));
      values[i] = pair.x;
      values[i + 1] = pair.y;
    } else {
      values[i] = Number::ToFloat(bits(i));
      values[i + 1] = Number::ToFloat(bits(i + 1));
    }
  }
}

template <typename Number>
__device__ __forceinline__ UnitBytes<kUnitBytes<Number>> Pack(
    const float (&values)[kCastElements]) {
  constexpr uint32_t kSize = sizeof(typename Number::Bits);
  UnitBytes<kUnitBytes<Number>> unit = {};
#pragma unroll
  for (uint32_t i = 0; i < kCastElements; i += 2) {
    if constexpr (kIsPairOfFp8<Number>) {
      unit.words[i / 4] |= uint32_t{PairFromFloat<Number>(values[i], values[i + 1])} << (i % 4 * 8);
    } else {
      for (uint32_t at = i; at < i + 2; ++at) {
        unit.words[at * kSize / 4] |= uint32_t{Number::FromFloat(values[at])}
                                      << (at * kSize % 4 * 8);
      }
    }
  }
  return unit;
}

}  // namespace kvrelay::cuda
