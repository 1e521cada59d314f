#include "engine/cuda/llama_cuda.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include "engine/cuda/blas.h"
#include "engine/cuda/kernels.h"
#include "engine/cuda/layer_events.h"
#include "engine/cuda/llama_weights_cuda.h"
#include "engine/cuda/rank_sum.h"
#include "engine/cuda/step_graphs.h"
#include "engine/cuda/step_inputs.h"

namespace kvrelay::engine::cuda {
namespace {

// A step's activations, row after row; lines 0 to the step's rows are in use.
struct Activations {
  DeviceBuffer<float> x;  // residual stream
  DeviceBuffer<std::byte> normed;
  DeviceBuffer<std::byte> qkv;
  DeviceBuffer<std::byte> q;
  DeviceBuffer<std::byte> attended;
  DeviceBuffer<float> lse;
  DeviceBuffer<std::byte> gate_up;
  DeviceBuffer<std::byte> activated;
  DeviceBuffer<float> logits;           // [sequences][columns of this rank]
  DeviceBuffer<ScoredToken> likeliest;  // [sequences]

  static Result<Activations> Allocate(const ModelConfig& config, const LlamaSplit& split,
                                      const LlamaCudaOptions& options) {
    Activations a;
    const size_t rows = options.limits.rows;
    const size_t q = size_t{split.query_heads} * config.head_dim;
    const size_t kv = size_t{split.kv.head_count} * config.head_dim;
    const auto typed = [&](size_t width) {
      return AllocateDevice<std::byte>(rows * width * SizeOf(options.dtype), "activations");
    };
    KVRELAY_ASSIGN_OR_RETURN(a.x, AllocateDevice<float>(rows * config.hidden_size, "activations"));
    KVRELAY_ASSIGN_OR_RETURN(a.normed, typed(config.hidden_size));
    KVRELAY_ASSIGN_OR_RETURN(a.qkv, typed(q + 2 * kv));
    KVRELAY_ASSIGN_OR_RETURN(a.q, typed(q));
    KVRELAY_ASSIGN_OR_RETURN(a.attended, typed(q));
    KVRELAY_ASSIGN_OR_RETURN(a.lse, AllocateDevice<float>(rows * split.query_heads, "activations"));
    KVRELAY_ASSIGN_OR_RETURN(a.gate_up, typed(2 * size_t{split.intermediate}));
    KVRELAY_ASSIGN_OR_RETURN(a.activated, typed(split.intermediate));
    const size_t columns = split.vocab_end - split.vocab_begin;
    KVRELAY_ASSIGN_OR_RETURN(a.logits,
                             AllocateDevice<float>(options.limits.sequences * columns, "logits"));
    KVRELAY_ASSIGN_OR_RETURN(a.likeliest,
                             AllocateDevice<ScoredToken>(options.limits.sequences, "logits"));
    return a;
  }
};

// What a step asks of the GPU.
struct Launch {
  uint32_t rows = 0;
  uint32_t logit_rows = 0;
  bool single_rows = false;        // of each sequence
  LayerEvents* written = nullptr;  // to be told of each layer; null: nobody asks
};

class LlamaShardCuda final : public ModelShard {
 public:
  static Result<std::unique_ptr<LlamaShardCuda>> Load(const ModelConfig& config,
                                                      const Checkpoint& checkpoint,
                                                      const LlamaCudaOptions& options,
                                                      const LlamaSplit& split,
                                                      const Matrix& embedding, const KvView& kv,
                                                      int ordinal, std::shared_ptr<RankSum> sum);
  ~LlamaShardCuda() override {
    cudaSetDevice(ordinal_);
    cudaStreamSynchronize(stream_.get());
  }

  Status Forward(const StepRows& step, const StageEdges& edges, const StepLogits& logits,
                 const LayersWritten& layers_written) override;

 private:
  LlamaShardCuda(const ModelConfig& config, const LlamaCudaOptions& options,
                 const LlamaSplit& split, int ordinal)
      : config_(config), options_(options), split_(split), ordinal_(ordinal) {}

  Status Run(const StepRows& step, const StageEdges& edges, const StepLogits& logits,
             const LayersWritten& layers_written);
  Status Enqueue(const Launch& launch);
  Status EnqueueLayer(uint32_t layer, const Launch& launch);
  Status Multiply(const void* x, uint32_t rows, const LinearCuda& linear, void* out) const;
  // x += the sum of all ranks' products, biases included.
  Status AddProduct(const void* in, uint32_t rows, const LinearCuda& linear);
  Status EnqueueLogits(uint32_t logit_rows);
  Status ReadLogits(const StepRows& step, const StepLogits& logits);
  uint32_t columns() const { return split_.vocab_end - split_.vocab_begin; }

  const ModelConfig config_;
  const LlamaCudaOptions options_;
  const LlamaSplit split_;
  const int ordinal_;
  // The stream outlives what it uses, graphs included.
  Stream stream_;
  LlamaWeightsCuda weights_;
  std::shared_ptr<RankSum> sum_;  // null: one rank
  std::optional<Blas> blas_;
  std::optional<StepInputs> inputs_;
  std::optional<AttentionStep> attention_;
  Activations a_;
  PinnedBuffer<ScoredToken> likeliest_;  // [sequences]
  std::optional<LayerEvents> written_;
  StepGraphs graphs_;
};

Result<std::unique_ptr<LlamaShardCuda>> LlamaShardCuda::Load(
    const ModelConfig& config, const Checkpoint& checkpoint, const LlamaCudaOptions& options,
    const LlamaSplit& split, const Matrix& embedding, const KvView& kv, int ordinal,
    std::shared_ptr<RankSum> sum) {
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(ordinal), "choosing a GPU"));
  std::unique_ptr<LlamaShardCuda> shard(new LlamaShardCuda(config, options, split, ordinal));
  KVRELAY_ASSIGN_OR_RETURN(shard->stream_, MakeStream());
  KVRELAY_ASSIGN_OR_RETURN(shard->blas_, Blas::Create(shard->stream_.get()));
  KVRELAY_ASSIGN_OR_RETURN(
      shard->weights_, LlamaWeightsCuda::Load(config, checkpoint, split, embedding, options.dtype));
  KVRELAY_ASSIGN_OR_RETURN(shard->inputs_, StepInputs::Create(options.limits));
  KVRELAY_ASSIGN_OR_RETURN(
      shard->attention_,
      AttentionStep::Create(AttentionShapeOf(config, split, options, kv.layout().dtype), kv,
                            options.relay));
  KVRELAY_ASSIGN_OR_RETURN(shard->a_, Activations::Allocate(config, split, options));
  KVRELAY_ASSIGN_OR_RETURN(shard->likeliest_,
                           AllocatePinned<ScoredToken>(options.limits.sequences, "logits"));
  KVRELAY_ASSIGN_OR_RETURN(shard->written_, LayerEvents::Create(split.kv.layer_count));
  shard->sum_ = std::move(sum);
  if (shard->sum_) {
    KVRELAY_RETURN_IF_ERROR(
        shard->sum_->Join(split.kv.tp_rank, size_t{options.limits.rows} * config.hidden_size));
  }
  return shard;
}

Status LlamaShardCuda::Multiply(const void* x, uint32_t rows, const LinearCuda& linear,
                                void* out) const {
  return blas_->Multiply(options_.dtype, x, rows, linear.inputs, linear.weights.get(),
                         linear.outputs, options_.dtype, out, false);
}

Status LlamaShardCuda::AddProduct(const void* in, uint32_t rows, const LinearCuda& linear) {
  float* const to = sum_ ? sum_->part(split_.kv.tp_rank) : a_.x.get();
  KVRELAY_RETURN_IF_ERROR(blas_->Multiply(options_.dtype, in, rows, linear.inputs,
                                          linear.weights.get(), linear.outputs, DType::kFp32, to,
                                          /*add=*/!sum_));
  if (linear.bias) {
    KVRELAY_RETURN_IF_ERROR(AddBias(linear.bias.get(), rows, linear.outputs, to, stream_.get()));
  }
  if (!sum_) return Status::Ok();
  return sum_->Add(split_.kv.tp_rank, size_t{rows} * linear.outputs, a_.x.get(), stream_.get());
}

Status LlamaShardCuda::EnqueueLayer(uint32_t index, const Launch& launch) {
  const LlamaLayerCuda& layer = weights_.layers[index];
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  cudaStream_t const stream = stream_.get();
  const uint32_t rows = launch.rows;
  KVRELAY_RETURN_IF_ERROR(RmsNorm(options_.dtype, a_.x.get(), nullptr, layer.input_norm.get(), eps,
                                  rows, config_.hidden_size, a_.normed.get(), stream));
  KVRELAY_RETURN_IF_ERROR(Multiply(a_.normed.get(), rows, layer.qkv, a_.qkv.get()));
  KVRELAY_RETURN_IF_ERROR(SplitAndStore({.dtype = options_.dtype,
                                         .query_heads = split_.query_heads,
                                         .kv_heads = split_.kv.head_count,
                                         .head_dim = config_.head_dim,
                                         .eps = eps,
                                         .qkv = a_.qkv.get(),
                                         .bias = layer.qkv.bias.get(),
                                         .q_norm = layer.q_norm.get(),
                                         .k_norm = layer.k_norm.get(),
                                         .inverse_frequencies = weights_.inverse_frequencies.get(),
                                         .positions = inputs_->positions(),
                                         .blocks = inputs_->blocks(),
                                         .q = a_.q.get(),
                                         .cache = attention_->cache(index)},
                                        rows, stream));
  if (launch.written != nullptr) KVRELAY_RETURN_IF_ERROR(launch.written->Record(stream));
  KVRELAY_RETURN_IF_ERROR(attention_->Attend(index, *inputs_, launch.single_rows, a_.q.get(),
                                             a_.attended.get(), a_.lse.get(), stream));
  KVRELAY_RETURN_IF_ERROR(AddProduct(a_.attended.get(), rows, layer.o));
  KVRELAY_RETURN_IF_ERROR(RmsNorm(options_.dtype, a_.x.get(), nullptr, layer.post_norm.get(), eps,
                                  rows, config_.hidden_size, a_.normed.get(), stream));
  KVRELAY_RETURN_IF_ERROR(Multiply(a_.normed.get(), rows, layer.gate_up, a_.gate_up.get()));
  KVRELAY_RETURN_IF_ERROR(SwiGlu(options_.dtype, a_.gate_up.get(), layer.gate_up.bias.get(), rows,
                                 split_.intermediate, a_.activated.get(), stream));
  return AddProduct(a_.activated.get(), rows, layer.down);
}

Status LlamaShardCuda::EnqueueLogits(uint32_t logit_rows) {
  if (logit_rows == 0) return Status::Ok();
  KVRELAY_RETURN_IF_ERROR(RmsNorm(options_.dtype, a_.x.get(), inputs_->logit_rows(),
                                  weights_.final_norm.get(),
                                  static_cast<float>(config_.rms_norm_eps), logit_rows,
                                  config_.hidden_size, a_.normed.get(), stream_.get()));
  KVRELAY_RETURN_IF_ERROR(blas_->Multiply(options_.dtype, a_.normed.get(), logit_rows,
                                          config_.hidden_size, weights_.head, columns(),
                                          DType::kFp32, a_.logits.get(), false));
  return Likeliest(a_.logits.get(), logit_rows, columns(), split_.vocab_begin, a_.likeliest.get(),
                   stream_.get());
}

Status LlamaShardCuda::Enqueue(const Launch& launch) {
  if (split_.first_stage()) {
    KVRELAY_RETURN_IF_ERROR(Embed(options_.dtype, weights_.embedding.get(), inputs_->tokens(),
                                  launch.rows, config_.hidden_size, a_.x.get(), stream_.get()));
  }
  KVRELAY_RETURN_IF_ERROR(attention_->Schedule(*inputs_, launch.single_rows, stream_.get()));
  for (uint32_t layer = 0; layer < split_.kv.layer_count; ++layer) {
    KVRELAY_RETURN_IF_ERROR(EnqueueLayer(layer, launch));
  }
  return split_.last_stage() ? EnqueueLogits(launch.logit_rows) : Status::Ok();
}

Status LlamaShardCuda::ReadLogits(const StepRows& step, const StepLogits& logits) {
  const size_t rows = step.logit_rows.size();
  if (rows == 0) return Status::Ok();
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaMemcpyAsync(likeliest_.get(), a_.likeliest.get(), rows * sizeof(ScoredToken),
                                 cudaMemcpyDeviceToHost, stream_.get()),
                 "reading tokens"));
  if (!logits.all.empty()) {
    KVRELAY_RETURN_IF_ERROR(
        CudaStatus(cudaMemcpy2DAsync(logits.all.data() + split_.vocab_begin,
                                     config_.vocab_size * sizeof(float), a_.logits.get(),
                                     columns() * sizeof(float), columns() * sizeof(float), rows,
                                     cudaMemcpyDeviceToHost, stream_.get()),
                   "reading logits"));
  }
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(stream_.get()), "a step"));
  std::copy_n(likeliest_.get(), rows, logits.likeliest.data() + split_.kv.tp_rank * rows);
  return Status::Ok();
}

Status LlamaShardCuda::Run(const StepRows& step, const StageEdges& edges, const StepLogits& logits,
                           const LayersWritten& layers_written) {
  const auto rows = static_cast<uint32_t>(step.token_ids.size());
  const size_t edge_bytes = size_t{rows} * config_.hidden_size * sizeof(float);
  Launch launch{.rows = rows,
                .logit_rows = static_cast<uint32_t>(step.logit_rows.size()),
                .single_rows = step.sequences.size() == rows};
  // A graph has all of a step that decodes, for as many rows or more.
  const bool as_graph = options_.graphs && launch.single_rows && launch.logit_rows == rows &&
                        !layers_written && !sum_ && split_.first_stage() && split_.last_stage();
  if (as_graph) {
    launch.rows = StepGraphs::Padded(rows, options_.limits.sequences);
    launch.logit_rows = launch.rows;
  }
  KVRELAY_RETURN_IF_ERROR(inputs_->Upload(step, launch.rows, stream_.get()));
  if (as_graph) {
    KVRELAY_RETURN_IF_ERROR(
        graphs_.Run(launch.rows, stream_.get(), [&] { return Enqueue(launch); }));
    return ReadLogits(step, logits);
  }
  if (!split_.first_stage()) {
    KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(a_.x.get(), edges.in.data(), edge_bytes,
                                                       cudaMemcpyHostToDevice, stream_.get()),
                                       "a stage's input"));
  }
  if (layers_written) {
    written_->Begin(layers_written);
    launch.written = &*written_;
  }
  if (sum_) sum_->Begin(split_.kv.tp_rank);
  KVRELAY_RETURN_IF_ERROR(Enqueue(launch));
  if (layers_written) KVRELAY_RETURN_IF_ERROR(written_->Finish());
  if (split_.last_stage()) return ReadLogits(step, logits);
  if (split_.kv.tp_rank > 0) return Status::Ok();
  return CudaStatus(cudaMemcpyAsync(edges.out.data(), a_.x.get(), edge_bytes,
                                    cudaMemcpyDeviceToHost, stream_.get()),
                    "a stage's output");
}

Status LlamaShardCuda::Forward(const StepRows& step, const StageEdges& edges,
                               const StepLogits& logits, const LayersWritten& layers_written) {
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(ordinal_), "choosing a GPU"));
  Status status = Run(step, edges, logits, layers_written);
  const Status ended = CudaStatus(cudaStreamSynchronize(stream_.get()), "a step");
  return status.ok() ? ended : status;
}

}  // namespace

AttentionShape AttentionShapeOf(const ModelConfig& config, const LlamaSplit& split,
                                const LlamaCudaOptions& options, DType cache_dtype) {
  AttentionShape shape{.query_heads = split.query_heads,
                       .kv_heads = split.kv.head_count,
                       .head_dim = config.head_dim,
                       .dtype = options.dtype,
                       .cache_dtype = cache_dtype,
                       .scale = 1.0F / std::sqrt(static_cast<float>(config.head_dim)),
                       .limits = options.limits};
  for (uint32_t layer = split.kv.layer_begin; layer < split.kv.layer_end(); ++layer) {
    shape.windows.push_back(config.window(layer));
  }
  return shape;
}

Result<ModelShards> BuildLlamaCuda(const ModelConfig& config, const Checkpoint& checkpoint,
                                   const LlamaCudaOptions& options, std::span<const Stage> stages,
                                   std::span<const KvView> caches, std::span<const int> ordinals) {
  KVRELAY_ASSIGN_OR_RETURN(const std::shared_ptr<const Matrix> embedding,
                           LoadEmbedding(config, checkpoint));
  ModelShards shards;
  for (const Stage& stage : stages) {
    TpGroup& group = *stage.group;
    const auto of_stage_ordinals = ordinals.subspan(shards.size(), group.size());
    std::shared_ptr<RankSum> sum;
    if (group.size() > 1) {
      KVRELAY_ASSIGN_OR_RETURN(sum, RankSum::Create(group, of_stage_ordinals));
    }
    ModelShards of_stage(group.size());
    KVRELAY_RETURN_IF_ERROR(group.Run([&](uint32_t rank) -> Status {
      KVRELAY_ASSIGN_OR_RETURN(const LlamaSplit split, LlamaSplit::Make(config, stage, rank));
      KVRELAY_ASSIGN_OR_RETURN(
          of_stage[rank],
          LlamaShardCuda::Load(config, checkpoint, options, split, *embedding,
                               caches[shards.size() + rank], of_stage_ordinals[rank], sum));
      return Status::Ok();
    }));
    std::ranges::move(of_stage, std::back_inserter(shards));
  }
  return shards;
}

}  // namespace kvrelay::engine::cuda
