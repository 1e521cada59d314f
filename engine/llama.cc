#include "engine/llama.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "base/parallel.h"
#include "engine/llama_weights.h"
#include "engine/matrix.h"
#include "engine/mla_weights.h"
#include "engine/rms_norm.h"
#include "engine/rope.h"
#include "engine/sampler.h"
#include "engine/self_attention.h"

namespace kvrelay::engine {
namespace {

// gate <- silu(gate) * up
void SwiGlu(float* gate, const float* up, size_t count) {
  for (size_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0F + std::exp(-gate[i])) * up[i];
}

class LlamaShard final : public ModelShard {
 public:
  static Result<std::unique_ptr<ModelShard>> Load(const ModelConfig& config,
                                                  const Checkpoint& checkpoint,
                                                  const LlamaSplit& split,
                                                  std::shared_ptr<const Matrix> embedding,
                                                  TpGroup& group, const KvView& kv);

  Status Forward(const StepRows& step, const StageEdges& edges, const StepLogits& logits,
                 const LayersWritten& layers_written) override;

 private:
  // A step's activations, row after row; kept between steps so that decoding allocates nothing.
  struct Buffers {
    std::vector<float> x;  // residual stream
    std::vector<float> normed;
    std::vector<float> gate_up;
    std::vector<float> activated;
    std::vector<float> update;  // what a sub-layer adds to x
    std::vector<float> logits;  // [logit_rows][columns of this rank]
  };

  LlamaShard(const ModelConfig& config, LlamaSplit split, LlamaWeights weights, TpGroup& group)
      : config_(config),
        split_(split),
        weights_(std::move(weights)),
        group_(group),
        inverse_frequencies_(InverseFrequencies(config.rope, config.rope_dim())) {}
  void Resize(size_t rows);
  void Embed(const StepRows& step);
  void NormRows(const std::vector<float>& weight, size_t rows);
  void FeedForward(const LlamaLayer& layer, size_t rows);
  // x += the sum of all ranks' `update`.
  Status AddUpdate();
  void Logits(const StepRows& step, const StepLogits& out);

  const ModelConfig config_;
  const LlamaSplit split_;
  const LlamaWeights weights_;
  TpGroup& group_;
  const std::vector<float> inverse_frequencies_;
  std::unique_ptr<SelfAttention> attention_;
  Buffers buffers_;
};

void LlamaShard::Resize(size_t rows) {
  Buffers& b = buffers_;
  b.x.resize(rows * config_.hidden_size);
  b.normed.resize(rows * config_.hidden_size);
  b.gate_up.resize(rows * 2 * split_.intermediate);
  b.activated.resize(rows * split_.intermediate);
  b.update.resize(rows * config_.hidden_size);
}

void LlamaShard::Embed(const StepRows& step) {
  const size_t hidden = config_.hidden_size;
  for (size_t row = 0; row < step.token_ids.size(); ++row) {
    const float* from = weights_.embedding->values.data() + step.token_ids[row] * hidden;
    std::copy(from, from + hidden, buffers_.x.data() + row * hidden);
  }
}

void LlamaShard::NormRows(const std::vector<float>& weight, size_t rows) {
  const size_t hidden = config_.hidden_size;
  ParallelFor(rows, kRowGrain, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; ++row) {
      RmsNorm(buffers_.x.data() + row * hidden, weight, config_.rms_norm_eps,
              buffers_.normed.data() + row * hidden);
    }
  });
}

void LlamaShard::FeedForward(const LlamaLayer& layer, size_t rows) {
  Buffers& b = buffers_;
  const size_t width = split_.intermediate;
  layer.gate_up.Apply(b.normed.data(), rows, b.gate_up.data());
  ParallelFor(rows, kRowGrain, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; ++row) {
      float* gate = b.gate_up.data() + row * 2 * width;
      SwiGlu(gate, gate + width, width);
      std::copy(gate, gate + width, b.activated.data() + row * width);
    }
  });
  layer.down.Apply(b.activated.data(), rows, b.update.data());
}

Status LlamaShard::AddUpdate() {
  KVRELAY_RETURN_IF_ERROR(group_.AllReduce(split_.kv.tp_rank, buffers_.update));
  for (size_t i = 0; i < buffers_.x.size(); ++i) buffers_.x[i] += buffers_.update[i];
  return Status::Ok();
}

void LlamaShard::Logits(const StepRows& step, const StepLogits& out) {
  const size_t rows = step.logit_rows.size();
  const size_t columns = split_.vocab_end - split_.vocab_begin;
  const size_t hidden = config_.hidden_size;
  for (size_t i = 0; i < rows; ++i) {
    RmsNorm(buffers_.x.data() + step.logit_rows[i] * hidden, weights_.head.norm,
            config_.rms_norm_eps, buffers_.normed.data() + i * hidden);
  }
  buffers_.logits.resize(rows * columns);
  MultiplyTransposed({buffers_.normed.data(), rows, hidden, hidden}, weights_.head_rows, columns,
                     buffers_.logits.data(), columns);
  for (size_t i = 0; i < rows; ++i) {
    const auto row = std::span<const float>(buffers_.logits).subspan(i * columns, columns);
    const uint32_t best = Greedy(row);
    out.likeliest[split_.kv.tp_rank * rows + i] = {row[best], split_.vocab_begin + best};
    if (!out.all.empty()) {
      std::ranges::copy(row, out.all.data() + i * config_.vocab_size + split_.vocab_begin);
    }
  }
}

Status LlamaShard::Forward(const StepRows& step, const StageEdges& edges, const StepLogits& logits,
                           const LayersWritten& layers_written) {
  Buffers& b = buffers_;
  const size_t rows = step.token_ids.size();
  Resize(rows);
  if (split_.first_stage()) {
    Embed(step);
  } else {
    std::copy(edges.in.begin(), edges.in.end(), b.x.begin());
  }
  const RopeTable rope(inverse_frequencies_, step.positions);
  for (uint32_t i = 0; i < split_.kv.layer_count; ++i) {
    const LlamaLayer& layer = weights_.layers[i];
    NormRows(layer.input_norm, rows);
    attention_->Store(step, rope, i, b.normed.data());
    if (layers_written) layers_written(i + 1);
    attention_->Attend(step, i, b.update.data());
    KVRELAY_RETURN_IF_ERROR(AddUpdate());
    NormRows(layer.post_norm, rows);
    FeedForward(layer, rows);
    KVRELAY_RETURN_IF_ERROR(AddUpdate());
  }
  if (split_.last_stage()) {
    Logits(step, logits);
  } else if (split_.kv.tp_rank == 0) {
    std::copy(b.x.begin(), b.x.end(), edges.out.begin());
  }
  return Status::Ok();
}

Result<std::unique_ptr<ModelShard>> LlamaShard::Load(const ModelConfig& config,
                                                     const Checkpoint& checkpoint,
                                                     const LlamaSplit& split,
                                                     std::shared_ptr<const Matrix> embedding,
                                                     TpGroup& group, const KvView& kv) {
  KVRELAY_ASSIGN_OR_RETURN(LlamaWeights weights,
                           LoadLlamaWeights(config, checkpoint, split, std::move(embedding)));
  std::unique_ptr<LlamaShard> shard(new LlamaShard(config, split, std::move(weights), group));
  if (config.mla) {
    KVRELAY_ASSIGN_OR_RETURN(std::vector<MlaLayer> layers,
                             LoadMlaWeights(config, checkpoint, split));
    shard->attention_ = MakeMlaAttention(shard->config_, shard->split_, std::move(layers), kv);
  } else {
    shard->attention_ =
        MakeGroupedAttention(shard->config_, shard->split_, shard->weights_.layers, kv);
  }
  return std::unique_ptr<ModelShard>(std::move(shard));
}

}  // namespace

Result<ModelShards> BuildLlama(const ModelConfig& config, const Checkpoint& checkpoint,
                               std::span<const Stage> stages, std::span<const KvView> caches) {
  KVRELAY_ASSIGN_OR_RETURN(const std::shared_ptr<const Matrix> embedding,
                           LoadEmbedding(config, checkpoint));
  ModelShards shards;
  for (const Stage& stage : stages) {
    TpGroup& group = *stage.group;
    ModelShards of_stage(group.size());
    KVRELAY_RETURN_IF_ERROR(group.Run([&](uint32_t rank) -> Status {
      KVRELAY_ASSIGN_OR_RETURN(const LlamaSplit split, LlamaSplit::Make(config, stage, rank));
      KVRELAY_ASSIGN_OR_RETURN(of_stage[rank],
                               LlamaShard::Load(config, checkpoint, split, embedding, group,
                                                caches[shards.size() + rank]));
      return Status::Ok();
    }));
    std::ranges::move(of_stage, std::back_inserter(shards));
  }
  return shards;
}

}  // namespace kvrelay::engine
