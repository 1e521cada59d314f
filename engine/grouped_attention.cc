#include <algorithm>
#include <cmath>

#include "base/parallel.h"
#include "engine/kv_write.h"
#include "engine/rms_norm.h"
#include "engine/self_attention.h"

namespace kvrelay::engine {
namespace {

class GroupedAttention final : public SelfAttention {
 public:
  GroupedAttention(const ModelConfig& config, const LlamaSplit& split,
                   const std::vector<LlamaLayer>& layers, const KvView& kv)
      : config_(config), split_(split), layers_(layers), kv_(kv) {}

  void Store(const StepRows& step, const RopeTable& rope, uint32_t layer,
             const float* normed) override;
  void Attend(const StepRows& step, uint32_t layer, float* update) override;

 private:
  void NormHeads(const std::vector<float>& weight, float* heads, uint32_t count) const;

  const ModelConfig& config_;
  const LlamaSplit& split_;
  const std::vector<LlamaLayer>& layers_;
  const KvView& kv_;
  // Row after row; kept between steps.
  std::vector<float> qkv_;
  std::vector<float> q_;
  std::vector<float> attended_;
  std::vector<float> lse_;
};

void GroupedAttention::NormHeads(const std::vector<float>& weight, float* heads,
                                 uint32_t count) const {
  if (weight.empty()) return;
  for (uint32_t head = 0; head < count; ++head, heads += weight.size()) {
    RmsNorm(heads, weight, config_.rms_norm_eps, heads);
  }
}

void GroupedAttention::Store(const StepRows& step, const RopeTable& rope, uint32_t layer,
                             const float* normed) {
  const size_t rows = step.token_ids.size();
  const size_t q = size_t{split_.query_heads} * config_.head_dim;
  const size_t kv_width = size_t{split_.kv.head_count} * config_.head_dim;
  const uint32_t block_size = kv_.layout().block_size;
  qkv_.resize(rows * (q + 2 * kv_width));
  q_.resize(rows * q);
  layers_[layer].qkv.Apply(normed, rows, qkv_.data());
  ParallelFor(rows, kRowGrain, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; ++row) {
      float* from = qkv_.data() + row * (q + 2 * kv_width);
      NormHeads(layers_[layer].q_norm, from, split_.query_heads);
      NormHeads(layers_[layer].k_norm, from + q, split_.kv.head_count);
      rope.Rotate(row, from, split_.query_heads + split_.kv.head_count);
      std::copy(from, from + q, q_.data() + row * q);
      WriteKv(kv_, layer, step.blocks[row], step.positions[row] % block_size, from + q,
              from + q + kv_width);
    }
  });
}

void GroupedAttention::Attend(const StepRows& step, uint32_t layer, float* update) {
  attended_.resize(q_.size());
  RunAttention(step, kv_, layer,
               {.sequences = step.sequences,
                .query_heads = split_.query_heads,
                .scale = 1.0F / std::sqrt(static_cast<float>(config_.head_dim)),
                .kind = {.window = config_.window(split_.kv.layer_begin + layer)}},
               q_, attended_, lse_);
  layers_[layer].o.Apply(attended_.data(), step.token_ids.size(), update);
}

}  // namespace

std::unique_ptr<SelfAttention> MakeGroupedAttention(const ModelConfig& config,
                                                    const LlamaSplit& split,
                                                    const std::vector<LlamaLayer>& layers,
                                                    const KvView& kv) {
  return std::make_unique<GroupedAttention>(config, split, layers, kv);
}

}  // namespace kvrelay::engine
