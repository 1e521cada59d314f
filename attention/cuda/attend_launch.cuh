// The launch of one instance of the attention kernel.
#pragma once

#include "attention/cuda/attend_kernel.cuh"

namespace kvrelay::attention::cuda {

template <typename T, uint32_t kHeadDim>
cudaError_t LaunchAttendOf(const CacheMaps& maps, const AttendArgs& args, cudaStream_t stream) {
  constexpr auto kKernel = AttendKernel<T, kHeadDim>;
  constexpr size_t kBytes = sizeof(Shared<kHeadDim>);
  static_assert(kBytes <= 227 * 1024);
  const cudaError_t error =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kKernel<<<args.shape.multiprocessors, kCtaThreads, kBytes, stream>>>(maps, args);
  return cudaGetLastError();
}

}  // namespace kvrelay::attention::cuda
