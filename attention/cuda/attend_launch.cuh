// The launch of the attention kernel of one type and head size.
#pragma once

#include "attention/cuda/attend_kernel.cuh"

namespace kvrelay::attention::cuda {

template <typename T, uint32_t kHeadDim>
cudaError_t LaunchAttendOf(const CacheMaps& maps, const AttendArgs& args, cudaStream_t stream) {
  const auto kernel = args.shape.group <= 8 ? AttendKernel<T, kHeadDim, 1>
                                            : AttendKernel<T, kHeadDim, kMaxGroup / 8>;
  constexpr size_t kBytes = sizeof(Shared<kHeadDim>);
  static_assert(kBytes <= 227 * 1024);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<args.shape.multiprocessors, kCtaThreads, kBytes, stream>>>(maps, args);
  return cudaGetLastError();
}

}  // namespace kvrelay::attention::cuda
