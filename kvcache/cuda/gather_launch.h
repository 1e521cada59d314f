// The kernels' launches, each compiled alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <span>

#include "kvcache/cuda/gather_args.h"

namespace kvrelay::cuda {

// `inlined`: the tables as an argument, padded to kFewTables or kManyTables, or nothing.
cudaError_t LaunchGatherCopy(const GatherArgs& args, std::span<const std::byte> inlined,
                             cudaStream_t stream);
cudaError_t LaunchGatherCast(const GatherArgs& args, std::span<const std::byte> inlined,
                             cudaStream_t stream);

// One of a kernel's variants.
template <uint32_t kTableBytes>
cudaError_t LaunchGather(void (*kernel)(GatherArgs, InlineTables<kTableBytes>),
                         const GatherArgs& args, std::span<const std::byte> inlined,
                         cudaStream_t stream) {
  // The driver copies an argument's bytes from where it is told; of none there is one byte.
  const void* const tables = kTableBytes == 0 ? static_cast<const void*>(&args) : inlined.data();
  void* arguments[] = {const_cast<GatherArgs*>(&args), const_cast<void*>(tables)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(args.ctas),
                          dim3(kGatherThreads), arguments, 0, stream);
}

}  // namespace kvrelay::cuda
