// The kernels' launches, each compiled alone.
#pragma once

#include <cuda_runtime_api.h>

#include "kvcache/cuda/gather_args.h"

namespace kvrelay::cuda {

cudaError_t LaunchGatherCopy(const GatherArgs& args, cudaStream_t stream);
cudaError_t LaunchGatherCast(const GatherArgs& args, cudaStream_t stream);

}  // namespace kvrelay::cuda
