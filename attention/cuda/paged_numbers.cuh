// How numbers of a cache become operands of the tensor cores.
//
// 16-bit ones are multiplied as they are. 8-bit ones become fp16, exactly: fp8_e4m3 as 2^-8 of its
// value, with kFactor 2^8 for what they are summed to. One register of 8-bit numbers makes two of
// fp16, so pairs of columns change places: a unit of 16 columns d makes the operands of products
// over k = 2c, 2c + 1, 2c + 8, 2c + 9 from d = 4c .. 4c + 3.
#pragma once

#include "attention/cuda/ptx_mma.h"

namespace kvrelay::attention::cuda {

template <typename T>
struct Wide {
  using Product = T;
  static constexpr uint32_t kBytes = 2;
  static constexpr float kFactor = 1;
};
using Bf16Numbers = Wide<__nv_bfloat16>;
using Fp16Numbers = Wide<__half>;

// Bytes a and b of `x` as the high bytes of two halves.
template <uint32_t kA, uint32_t kB>
__device__ __forceinline__ uint32_t HighBytes(uint32_t x) {
  return __byte_perm(x, 0, kB << 12 | kA << 4 | 0x0404);
}

struct E4m3Numbers {
  using Product = __half;
  static constexpr uint32_t kBytes = 1;
  static constexpr float kFactor = 256;
  // Numbers kA and kB of the four in `x`. NaN becomes 480.
  template <uint32_t kA, uint32_t kB>
  __device__ static __forceinline__ uint32_t Halves(uint32_t x) {
    const uint32_t high = HighBytes<kA, kB>(x);
    return (high & 0x80008000) | (high >> 1 & 0x3f803f80);
  }
};

struct E5m2Numbers {
  using Product = __half;
  static constexpr uint32_t kBytes = 1;
  static constexpr float kFactor = 1;
  template <uint32_t kA, uint32_t kB>
  __device__ static __forceinline__ uint32_t Halves(uint32_t x) {
    return HighBytes<kA, kB>(x);
  }
};

struct Int8Numbers {
  using Product = __half;
  static constexpr uint32_t kBytes = 1;
  static constexpr float kFactor = 1;
  // 1024 + (number + 128) is a half whose low byte is the number's, but for the sign.
  template <uint32_t kA, uint32_t kB>
  __device__ static __forceinline__ uint32_t Halves(uint32_t x) {
    uint32_t halves = __byte_perm(x ^ 0x80808080, 0x64646464, kB << 8 | kA | 0x4040);
    asm("sub.f16x2 %0, %0, %1;" : "+r"(halves) : "r"(0x64806480));
    return halves;
  }
};

}  // namespace kvrelay::attention::cuda
