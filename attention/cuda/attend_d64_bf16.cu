#include <cuda_bf16.h>

#include "attention/cuda/attend_launch.cuh"
#include "attention/cuda/launch.h"

namespace kvrelay::attention::cuda {

cudaError_t LaunchAttendD64Bf16(const CacheMaps& maps, const AttendArgs& args,
                                cudaStream_t stream) {
  return LaunchAttendOf<__nv_bfloat16, 64>(maps, args, stream);
}

}  // namespace kvrelay::attention::cuda
