// One rank's weights of a Llama model, as LlamaShard multiplies with them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "engine/checkpoint.h"
#include "engine/matrix.h"
#include "engine/model_config.h"
#include "engine/pipeline.h"
#include "kvcache/shard.h"

namespace kvrelay::engine {

// Which part of each layer a rank computes.
struct LlamaSplit {
  uint32_t query_heads = 0;  // of this rank; the first one is query_head_begin
  uint32_t query_head_begin = 0;
  KvShard kv;
  uint32_t intermediate = 0;  // columns of gate and up; the first one is intermediate_begin
  uint32_t intermediate_begin = 0;
  uint32_t vocab_begin = 0;  // rows of the head
  uint32_t vocab_end = 0;

  // kInvalidArgument: see CheckTensorParallel.
  static Result<LlamaSplit> Make(const ModelConfig& config, const Stage& stage, uint32_t tp_rank);
  bool first_stage() const { return kv.layer_begin == 0; }
  bool last_stage() const { return kv.layer_end() == kv.total_layers; }
};

// Of O and down, whose results the ranks add up, only the first rank has the bias.
struct LlamaLayer {
  std::vector<float> input_norm;
  // Empty with MLA: engine/mla_weights.h.
  Linear qkv;                 // outputs: query heads, key heads, value heads
  std::vector<float> q_norm;  // of each head; empty: none
  std::vector<float> k_norm;
  Linear o;
  std::vector<float> post_norm;
  Linear gate_up;  // outputs: gate, then up
  Linear down;
};

// What stands behind the last layer.
struct LlamaHead {
  std::vector<float> norm;
  Matrix own;  // the rank's rows; empty when tied to the embedding
};

struct LlamaWeights {
  // [vocab_size][hidden_size]; shared by all ranks, used by the first stage and by a tied head.
  std::shared_ptr<const Matrix> embedding;
  std::vector<LlamaLayer> layers;  // of the stage
  // Last stage only.
  LlamaHead head;
  const float* head_rows = nullptr;  // row vocab_begin of the head, in `embedding` or `head`
};

Result<std::shared_ptr<const Matrix>> LoadEmbedding(const ModelConfig& config,
                                                    const Checkpoint& checkpoint);
// `layer` of the model, the part of the rank.
Result<LlamaLayer> LoadLlamaLayer(const ModelConfig& config, const Checkpoint& checkpoint,
                                  uint32_t layer, const LlamaSplit& split);
Result<LlamaHead> LoadLlamaHead(const ModelConfig& config, const Checkpoint& checkpoint,
                                const LlamaSplit& split);
Result<LlamaWeights> LoadLlamaWeights(const ModelConfig& config, const Checkpoint& checkpoint,
                                      const LlamaSplit& split,
                                      std::shared_ptr<const Matrix> embedding);

}  // namespace kvrelay::engine
