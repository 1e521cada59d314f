// One rank's weights of multi-head latent attention, as MlaAttention multiplies with them.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"
#include "engine/checkpoint.h"
#include "engine/llama_weights.h"
#include "engine/matrix.h"
#include "engine/model_config.h"

namespace kvrelay::engine {

// Where a checkpoint turns neighbouring elements of a rotated part together, the outputs here are
// in RopeTable's order: dot products of queries and keys are the same.
struct MlaLayer {
  Linear q_a;  // empty, as its norm, where queries are made from the row itself
  std::vector<float> q_a_norm;
  Linear q;     // outputs: this rank's heads, of each what has no position, then what has
  Linear kv_a;  // outputs: the latent, then the key with position
  std::vector<float> kv_a_norm;
  Matrix up_k;  // [heads][kv_lora_rank] rows of nope_dim: transposed, absorbed by the queries
  Matrix up_v;  // [heads][v_dim] rows of kv_lora_rank
  Linear o;
};

// The stage's layers. config.mla is there.
Result<std::vector<MlaLayer>> LoadMlaWeights(const ModelConfig& config,
                                             const Checkpoint& checkpoint, const LlamaSplit& split);

}  // namespace kvrelay::engine
