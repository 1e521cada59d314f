#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "base/status.h"

namespace kvrelay::cuda {

// kInternal, saying what was tried, unless it is cudaSuccess.
inline Status CudaStatus(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return {};
  return {Code::kInternal, what + ": " + cudaGetErrorString(error)};
}

}  // namespace kvrelay::cuda
