// One rank's weights of a Llama model on its GPU, in the arithmetic's type; norms and biases fp32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/status.h"
#include "engine/checkpoint.h"
#include "engine/cuda/cuda_memory.h"
#include "engine/llama_weights.h"
#include "engine/model_config.h"
#include "kvcache/layout.h"

namespace kvrelay::engine::cuda {

struct LinearCuda {
  uint32_t outputs = 0;
  uint32_t inputs = 0;
  DeviceBuffer<std::byte> weights{};  // [outputs][inputs]
  DeviceBuffer<float> bias{};         // [outputs], or null
};

// As LlamaLayer; null norms of heads: none.
struct LlamaLayerCuda {
  DeviceBuffer<float> input_norm;
  LinearCuda qkv;
  DeviceBuffer<float> q_norm;
  DeviceBuffer<float> k_norm;
  LinearCuda o;
  DeviceBuffer<float> post_norm;
  LinearCuda gate_up;
  LinearCuda down;
};

struct LlamaWeightsCuda {
  DeviceBuffer<std::byte> embedding;  // null where neither the first stage nor a tied head is
  std::vector<LlamaLayerCuda> layers;
  // Last stage only.
  DeviceBuffer<float> final_norm;
  DeviceBuffer<std::byte> own_head;  // null when tied
  const std::byte* head = nullptr;   // row vocab_begin of the head
  // [head_dim / 2]
  DeviceBuffer<float> inverse_frequencies;

  // To the device that is current, layer by layer. `embedding` as LoadEmbedding's.
  static Result<LlamaWeightsCuda> Load(const ModelConfig& config, const Checkpoint& checkpoint,
                                       const LlamaSplit& split, const Matrix& embedding,
                                       DType dtype);
};

}  // namespace kvrelay::engine::cuda
