#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/cuda/device_array.h"
#include "tools/bench/cuda/flush.h"

namespace kvrelay::bench {
namespace {

constexpr size_t kBytes = size_t{256} << 20;

__global__ void Write(uint4* to, size_t count, uint32_t value) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    to[i] = {value, value, value, value};
  }
}

__global__ void Read(const uint4* from, size_t count, uint32_t* never) {
  uint32_t sum = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    sum += from[i].x ^ from[i].w;
  }
  if (sum == 0x12345678) *never = sum;
}

__device__ uint32_t Mix(uint64_t x) {
  x = (x ^ x >> 31) * 0x9e3779b97f4a7c15;
  x = (x ^ x >> 29) * 0xbf58476d1ce4e5b9;
  return static_cast<uint32_t>(x >> 32);
}

template <typename T>
__global__ void Fill(T* to, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t bits = Mix(i + (uint64_t{seed} << 40) + 1);
    // The sum of four uniform numbers: variance 1.
    const float sum =
        static_cast<float>((bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24)) -
        510.0F;
    to[i] = static_cast<T>(sum / 147.8F);
  }
}

__global__ void Empty() {}

}  // namespace

Flush::Flush() { KVRELAY_CUDA(cudaMalloc(reinterpret_cast<void**>(&memory_), 2 * kBytes)); }
Flush::~Flush() { cudaFree(memory_); }

void Flush::Enqueue(cudaStream_t stream) const {
  auto* units = reinterpret_cast<uint4*>(memory_);
  constexpr size_t kCount = kBytes / sizeof(uint4);
  Write<<<1056, 512, 0, stream>>>(units, kCount, 7);
  Read<<<1056, 512, 0, stream>>>(units + kCount, kCount, reinterpret_cast<uint32_t*>(memory_));
}

void FillRandom(void* memory, size_t elements, bool bf16, uint32_t seed) {
  if (bf16) {
    Fill<<<1056, 512>>>(static_cast<__nv_bfloat16*>(memory), elements, seed);
  } else {
    Fill<<<1056, 512>>>(static_cast<__half*>(memory), elements, seed);
  }
  KVRELAY_CUDA(cudaDeviceSynchronize());
}

void Nothing(cudaStream_t stream) { Empty<<<1, 32, 0, stream>>>(); }

}  // namespace kvrelay::bench
