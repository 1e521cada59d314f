// NVIDIA GPUs as the platform of an engine.
//
// Compiles without CUDA.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "base/status.h"
#include "engine/platform.h"
#include "kvcache/layout.h"

namespace kvrelay::engine::cuda {

struct PlatformOptions {
  // Of each rank, as CUDA counts the GPUs that this process sees; one: of all ranks.
  std::vector<int> ordinals = {0};
  DType dtype = DType::kBf16;  // of weights and activations: fp32, fp16 or bf16
};

// kRefused in a build without CUDA; kNotFound without cuBLAS; errors as kvrelay::cuda::OpenDevice.
Result<std::shared_ptr<const Platform>> OpenPlatform(const PlatformOptions& options);

}  // namespace kvrelay::engine::cuda
