// The kernels' launches: one attention kernel for each head size and type, each compiled alone.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/cuda/attend_args.h"
#include "attention/cuda/relay_cuda.h"

namespace kvrelay::attention::cuda {

using LaunchAttend = cudaError_t(const CacheMaps& maps, const AttendArgs& args,
                                 cudaStream_t stream);
LaunchAttend LaunchAttendD128Bf16;
LaunchAttend LaunchAttendD128Fp16;
LaunchAttend LaunchAttendD64Bf16;
LaunchAttend LaunchAttendD64Fp16;

// Fills the plan from the batch.
cudaError_t LaunchSchedule(const AttendShape& shape, uint32_t head_dim, const StepBatch& batch,
                           RelayMode mode, const Plan& plan, cudaStream_t stream);

}  // namespace kvrelay::attention::cuda
