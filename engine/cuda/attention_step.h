// Attention of a rank's layers on a GPU: paged, and relay for decoding rows where it can.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "attention/backend.h"
#include "attention/cuda/paged_cuda.h"
#include "attention/cuda/relay_cuda.h"
#include "base/status.h"
#include "engine/cuda/cuda_memory.h"
#include "engine/cuda/kernels.h"
#include "engine/cuda/step_inputs.h"
#include "kvcache/kv_view.h"

namespace kvrelay::engine::cuda {

struct AttentionShape {
  uint32_t query_heads = 0;  // of the rank
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  DType dtype = DType::kBf16;  // of Q and of the output
  DType cache_dtype = DType::kBf16;
  float scale = 1;
  StepLimits limits;
  std::vector<uint32_t> windows{};  // of each layer; 0: all tokens
};

// What the relay kernels would say of the shape, on the device that is current.
Status RelayServes(const AttentionShape& shape);
Status PagedServes(const AttentionShape& shape);

// One stream, with its device current.
class AttentionStep {
 public:
  // `relay`: decoding rows that share prefixes read them once; kNever: paged attention for all.
  static Result<AttentionStep> Create(const AttentionShape& shape, const KvView& kv,
                                      attention::cuda::RelayMode relay);

  // Once a step, before its layers. `single_rows`: as in StepInputs::batch.
  Status Schedule(const StepInputs& inputs, bool single_rows, cudaStream_t stream) const;
  Status Attend(uint32_t layer, const StepInputs& inputs, bool single_rows, const void* q,
                void* out, float* lse, cudaStream_t stream) const;
  const CacheLayer& cache(uint32_t layer) const { return layers_[layer].cache; }

 private:
  struct Relay {
    attention::cuda::RelayKernels kernels;
    attention::cuda::RelayMode mode;
    DeviceBuffer<std::byte> workspace;
  };
  struct Paged {  // of layers with one window
    attention::cuda::PagedKernels kernels;
    DeviceBuffer<std::byte> workspace;
  };
  struct Layer {
    CacheLayer cache;
    attention::cuda::PagedLayer paged;
    attention::cuda::LayerMaps maps;  // of relay
    size_t window = 0;                // index into paged_
  };
  AttentionStep() = default;

  std::optional<Relay> relay_;
  std::vector<Paged> paged_;
  std::vector<Layer> layers_;
};

}  // namespace kvrelay::engine::cuda
