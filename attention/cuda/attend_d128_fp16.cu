#include <cuda_fp16.h>

#include "attention/cuda/attend_launch.cuh"
#include "attention/cuda/launch.h"

namespace kvrelay::attention::cuda {

cudaError_t LaunchAttendD128Fp16(const CacheMaps& maps, const AttendArgs& args,
                                 cudaStream_t stream) {
  return LaunchAttendOf<__half, 128>(maps, args, stream);
}

}  // namespace kvrelay::attention::cuda
