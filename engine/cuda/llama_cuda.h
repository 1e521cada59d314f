// The Llama family (engine/llama.h) on GPUs: products by cuBLAS, decoding steps as CUDA graphs.
//
// Activations between products are of the arithmetic's type; the residual stream and all sums are
// fp32. Tensor and pipeline parallel as on the host; ranks may share a GPU.
#pragma once

#include <span>

#include "base/status.h"
#include "engine/checkpoint.h"
#include "engine/cuda/attention_step.h"
#include "engine/llama_weights.h"
#include "engine/model.h"
#include "engine/model_config.h"
#include "kvcache/kv_view.h"

namespace kvrelay::engine::cuda {

struct LlamaCudaOptions {
  DType dtype = DType::kBf16;
  attention::cuda::RelayMode relay = attention::cuda::RelayMode::kNever;
  bool graphs = true;
  StepLimits limits;
};

// `ordinals`: the GPU of each rank; `caches` are on them. Errors as BuildLlama; kNotFound without
// cuBLAS, kResourceExhausted.
Result<ModelShards> BuildLlamaCuda(const ModelConfig& config, const Checkpoint& checkpoint,
                                   const LlamaCudaOptions& options, std::span<const Stage> stages,
                                   std::span<const KvView> caches, std::span<const int> ordinals);

// What a rank's layers ask of attention.
AttentionShape AttentionShapeOf(const ModelConfig& config, const LlamaSplit& split,
                                const LlamaCudaOptions& options, DType cache_dtype);

}  // namespace kvrelay::engine::cuda
