// CUDA's errors as ours.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "base/status.h"

namespace kvrelay::attention::cuda {

inline Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::Ok();
  return {Code::kInternal, std::string(what) + ": " + cudaGetErrorString(error)};
}

}  // namespace kvrelay::attention::cuda
