// The Llama family in fp32: pre-norm RMSNorm, grouped-query attention with rotary positions,
// SwiGLU; by configuration also biases, norms of Q's and K's heads, layers with a sliding window
// (whose cache holds all tokens all the same), and multi-head latent attention. llama_family.h has
// the members, self_attention.h the ways to attend.
//
// Tensor parallel: Q, K, V, gate and up are split by outputs (whole heads; KV heads are replicated
// where ranks outnumber them, the latent always), O and down by inputs with an all-reduce behind
// them, the head by vocabulary. The embedding, and the head when it is tied to it, is held once and
// shared by the ranks.
//
// Pipeline parallel: the first stage has the embedding, the last the final norm and the head.
#pragma once

#include "base/status.h"
#include "engine/model.h"

namespace kvrelay::engine {

Result<ModelShards> BuildLlama(const ModelConfig& config, const Checkpoint& checkpoint,
                               std::span<const Stage> stages, std::span<const KvView> caches);

}  // namespace kvrelay::engine
