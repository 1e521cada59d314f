// The attention sub-layer of a decoder's layers, one rank's part: what the members of the family do
// each in their way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention/attention.h"
#include "engine/llama_weights.h"
#include "engine/mla_weights.h"
#include "engine/model.h"
#include "engine/model_config.h"
#include "engine/rope.h"
#include "kvcache/kv_view.h"

namespace kvrelay::engine {

// Rows per range of the element-wise passes.
inline constexpr size_t kRowGrain = 16;

// For each layer of the stage, Store and then Attend, with the same step.
class SelfAttention {
 public:
  virtual ~SelfAttention() = default;
  // Makes queries of the normed rows ([rows][hidden_size]), kept for Attend, and writes what the
  // cache holds of them. `rope` has the step's positions.
  virtual void Store(const StepRows& step, const RopeTable& rope, uint32_t layer,
                     const float* normed) = 0;
  // This rank's part of the sub-layer's result, [rows][hidden_size].
  virtual void Attend(const StepRows& step, uint32_t layer, float* update) = 0;
};

// Query heads in groups that share a KV head. All references outlive it.
std::unique_ptr<SelfAttention> MakeGroupedAttention(const ModelConfig& config,
                                                    const LlamaSplit& split,
                                                    const std::vector<LlamaLayer>& layers,
                                                    const KvView& kv);
// MLA over the latent cache, with absorbed queries (attention/attention.h), for prompts and single
// tokens alike. Query heads are split among the ranks, the latent is on each.
std::unique_ptr<SelfAttention> MakeMlaAttention(const ModelConfig& config, const LlamaSplit& split,
                                                std::vector<MlaLayer> layers, const KvView& kv);

// The attention that the step asks for. `q` and `out` as attention/attention.h says, `lse` is
// resized.
void RunAttention(const StepRows& step, const KvView& kv, uint32_t layer,
                  const attention::Batch& batch, const std::vector<float>& q,
                  std::vector<float>& out, std::vector<float>& lse);

}  // namespace kvrelay::engine
