#include <algorithm>
#include <cmath>
#include <utility>

#include "base/parallel.h"
#include "engine/kv_write.h"
#include "engine/rms_norm.h"
#include "engine/self_attention.h"

namespace kvrelay::engine {
namespace {

// Of the norms of latents: the model's own epsilon is not theirs.
constexpr double kLatentEps = 1e-6;

class MlaAttention final : public SelfAttention {
 public:
  MlaAttention(const ModelConfig& config, const LlamaSplit& split, std::vector<MlaLayer> layers,
               const KvView& kv)
      : mla_(*config.mla), heads_(split.query_heads), layers_(std::move(layers)), kv_(kv) {}

  void Store(const StepRows& step, const RopeTable& rope, uint32_t layer,
             const float* normed) override;
  void Attend(const StepRows& step, uint32_t layer, float* update) override;

 private:
  // Queries as the model defines them, to q_: [rows][heads][nope, rope].
  void MakeQueries(const MlaLayer& layer, const float* normed, size_t rows);
  // To absorbed_: [rows][heads][latent, rope].
  void Absorb(const MlaLayer& layer, const RopeTable& rope, size_t rows);

  const MlaConfig mla_;
  const uint32_t heads_;  // of this rank
  const std::vector<MlaLayer> layers_;
  const KvView& kv_;
  // Row after row; kept between steps.
  std::vector<float> q_latent_;
  std::vector<float> q_;
  std::vector<float> absorbed_;
  std::vector<float> latent_;    // what the cache gets: [latent, rope]
  std::vector<float> attended_;  // as absorbed_
  std::vector<float> values_;    // [heads][value]
  std::vector<float> lse_;
};

void MlaAttention::MakeQueries(const MlaLayer& layer, const float* normed, size_t rows) {
  q_.resize(rows * heads_ * mla_.qk_dim());
  if (mla_.q_lora_rank == 0) return layer.q.Apply(normed, rows, q_.data());
  q_latent_.resize(rows * mla_.q_lora_rank);
  layer.q_a.Apply(normed, rows, q_latent_.data());
  ParallelFor(rows, kRowGrain, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; ++row) {
      float* const latent = q_latent_.data() + row * mla_.q_lora_rank;
      RmsNorm(latent, layer.q_a_norm, kLatentEps, latent);
    }
  });
  layer.q.Apply(q_latent_.data(), rows, q_.data());
}

void MlaAttention::Absorb(const MlaLayer& layer, const RopeTable& rope, size_t rows) {
  const size_t from_stride = size_t{heads_} * mla_.qk_dim();
  const size_t to_stride = size_t{heads_} * mla_.row_dim();
  absorbed_.resize(rows * to_stride);
  for (uint32_t head = 0; head < heads_; ++head) {
    MultiplyTransposed({q_.data() + head * size_t{mla_.qk_dim()}, rows, mla_.nope_dim, from_stride},
                       layer.up_k.Row(size_t{head} * mla_.kv_lora_rank), mla_.kv_lora_rank,
                       absorbed_.data() + head * size_t{mla_.row_dim()}, to_stride);
  }
  ParallelFor(rows, kRowGrain, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; ++row) {
      for (uint32_t head = 0; head < heads_; ++head) {
        const float* const from =
            q_.data() + row * from_stride + head * size_t{mla_.qk_dim()} + mla_.nope_dim;
        float* const to =
            absorbed_.data() + row * to_stride + head * size_t{mla_.row_dim()} + mla_.kv_lora_rank;
        std::copy_n(from, mla_.rope_dim, to);
        rope.Rotate(row, to, 1);
      }
    }
  });
}

void MlaAttention::Store(const StepRows& step, const RopeTable& rope, uint32_t layer,
                         const float* normed) {
  const size_t rows = step.token_ids.size();
  const MlaLayer& weights = layers_[layer];
  const uint32_t block_size = kv_.layout().block_size;
  latent_.resize(rows * mla_.row_dim());
  weights.kv_a.Apply(normed, rows, latent_.data());
  ParallelFor(rows, kRowGrain, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; ++row) {
      float* const latent = latent_.data() + row * mla_.row_dim();
      RmsNorm(latent, weights.kv_a_norm, kLatentEps, latent);
      rope.Rotate(row, latent + mla_.kv_lora_rank, 1);
      WriteKv(kv_, layer, step.blocks[row], step.positions[row] % block_size, latent, nullptr);
    }
  });
  MakeQueries(weights, normed, rows);
  Absorb(weights, rope, rows);
}

void MlaAttention::Attend(const StepRows& step, uint32_t layer, float* update) {
  const size_t rows = step.token_ids.size();
  attended_.resize(absorbed_.size());
  RunAttention(step, kv_, layer,
               {.sequences = step.sequences,
                .query_heads = heads_,
                .scale = 1.0F / std::sqrt(static_cast<float>(mla_.qk_dim()))},
               absorbed_, attended_, lse_);
  values_.resize(rows * heads_ * mla_.v_dim);
  for (uint32_t head = 0; head < heads_; ++head) {
    MultiplyTransposed({attended_.data() + head * size_t{mla_.row_dim()}, rows, mla_.kv_lora_rank,
                        size_t{heads_} * mla_.row_dim()},
                       layers_[layer].up_v.Row(size_t{head} * mla_.v_dim), mla_.v_dim,
                       values_.data() + head * size_t{mla_.v_dim}, size_t{heads_} * mla_.v_dim);
  }
  layers_[layer].o.Apply(values_.data(), rows, update);
}

}  // namespace

std::unique_ptr<SelfAttention> MakeMlaAttention(const ModelConfig& config, const LlamaSplit& split,
                                                std::vector<MlaLayer> layers, const KvView& kv) {
  return std::make_unique<MlaAttention>(config, split, std::move(layers), kv);
}

}  // namespace kvrelay::engine
