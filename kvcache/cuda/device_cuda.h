// NVIDIA GPUs as devices: memory by CUDA's virtual memory management, plans by the gather kernel.
//
// Compiles without CUDA.
#pragma once

#include <memory>

#include "base/status.h"
#include "kvcache/cuda/gather_cuda.h"
#include "kvcache/device.h"

namespace kvrelay::cuda {

// `ordinal` as CUDA counts the GPUs that this process sees. Copies run on streams of their own, of
// the highest priority. kInvalidArgument when there is no such GPU; kRefused when its driver cannot
// do what a Device does.
Result<std::shared_ptr<Device>> OpenDevice(int ordinal, const GatherOptions& options = {});

}  // namespace kvrelay::cuda
