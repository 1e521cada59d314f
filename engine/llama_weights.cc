#include "engine/llama_weights.h"

#include <algorithm>
#include <string>
#include <utility>

#include "engine/model.h"
#include "engine/read_linear.h"

namespace kvrelay::engine {
namespace {

Part QueryHeads(const ModelConfig& config, const LlamaSplit& split) {
  const uint64_t dim = config.head_dim;
  return {config.num_heads * dim, split.query_head_begin * dim, split.query_heads * dim};
}

Result<Linear> ReadQkv(const ModelConfig& config, const Checkpoint& checkpoint,
                       const std::string& prefix, const LlamaSplit& split) {
  const uint64_t dim = config.head_dim;
  const Part q = QueryHeads(config, split);
  const Part kv = {config.num_kv_heads * dim, split.kv.head_begin * dim, split.kv.head_count * dim};
  Linear out(q.count + 2 * kv.count, config.hidden_size, config.qkv_bias);
  KVRELAY_RETURN_IF_ERROR(ReadOutputs(checkpoint, prefix + "q_proj", q, 0, out));
  KVRELAY_RETURN_IF_ERROR(ReadOutputs(checkpoint, prefix + "k_proj", kv, q.count, out));
  KVRELAY_RETURN_IF_ERROR(ReadOutputs(checkpoint, prefix + "v_proj", kv, q.count + kv.count, out));
  return out;
}

Result<Linear> ReadGateUp(const ModelConfig& config, const Checkpoint& checkpoint,
                          const std::string& prefix, const LlamaSplit& split) {
  const Part part = {config.intermediate_size, split.intermediate_begin, split.intermediate};
  Linear out(2 * part.count, config.hidden_size, config.mlp_bias);
  KVRELAY_RETURN_IF_ERROR(ReadOutputs(checkpoint, prefix + "gate_proj", part, 0, out));
  KVRELAY_RETURN_IF_ERROR(ReadOutputs(checkpoint, prefix + "up_proj", part, part.count, out));
  return out;
}

Status ReadAttention(const ModelConfig& config, const Checkpoint& checkpoint,
                     const std::string& prefix, const LlamaSplit& split, LlamaLayer& layer) {
  if (config.qk_norm) {
    KVRELAY_RETURN_IF_ERROR(
        ReadNorm(checkpoint, prefix + "q_norm.weight", config.head_dim, layer.q_norm));
    KVRELAY_RETURN_IF_ERROR(
        ReadNorm(checkpoint, prefix + "k_norm.weight", config.head_dim, layer.k_norm));
  }
  KVRELAY_ASSIGN_OR_RETURN(layer.qkv, ReadQkv(config, checkpoint, prefix, split));
  KVRELAY_ASSIGN_OR_RETURN(
      layer.o, ReadInputs(checkpoint, prefix + "o_proj", config.hidden_size,
                          QueryHeads(config, split), config.o_bias && split.kv.tp_rank == 0));
  return Status::Ok();
}

}  // namespace

Result<LlamaSplit> LlamaSplit::Make(const ModelConfig& config, const Stage& stage,
                                    uint32_t tp_rank) {
  const uint32_t tp_size = stage.group->size();
  KVRELAY_RETURN_IF_ERROR(CheckTensorParallel(config, tp_size));
  LlamaSplit split;
  split.query_heads = config.num_heads / tp_size;
  split.query_head_begin = tp_rank * split.query_heads;
  KVRELAY_ASSIGN_OR_RETURN(split.kv, ShardOf(config, stage, tp_rank));
  split.intermediate = config.intermediate_size / tp_size;
  split.intermediate_begin = tp_rank * split.intermediate;
  split.vocab_begin = static_cast<uint32_t>(uint64_t{config.vocab_size} * tp_rank / tp_size);
  split.vocab_end = static_cast<uint32_t>(uint64_t{config.vocab_size} * (tp_rank + 1) / tp_size);
  return split;
}

Result<std::shared_ptr<const Matrix>> LoadEmbedding(const ModelConfig& config,
                                                    const Checkpoint& checkpoint) {
  auto embedding = std::make_shared<Matrix>(config.vocab_size, config.hidden_size);
  KVRELAY_RETURN_IF_ERROR(ReadRows(checkpoint, "model.embed_tokens.weight", config.vocab_size,
                                   config.hidden_size, 0, config.vocab_size, embedding->values));
  return std::shared_ptr<const Matrix>(std::move(embedding));
}

Result<LlamaLayer> LoadLlamaLayer(const ModelConfig& config, const Checkpoint& checkpoint,
                                  uint32_t index, const LlamaSplit& split) {
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  const bool first_rank = split.kv.tp_rank == 0;
  LlamaLayer layer;
  KVRELAY_RETURN_IF_ERROR(ReadNorm(checkpoint, prefix + "input_layernorm.weight",
                                   config.hidden_size, layer.input_norm));
  KVRELAY_RETURN_IF_ERROR(ReadNorm(checkpoint, prefix + "post_attention_layernorm.weight",
                                   config.hidden_size, layer.post_norm));
  if (!config.mla) {
    KVRELAY_RETURN_IF_ERROR(ReadAttention(config, checkpoint, prefix + "self_attn.", split, layer));
  }
  KVRELAY_ASSIGN_OR_RETURN(layer.gate_up, ReadGateUp(config, checkpoint, prefix + "mlp.", split));
  KVRELAY_ASSIGN_OR_RETURN(
      layer.down,
      ReadInputs(checkpoint, prefix + "mlp.down_proj", config.hidden_size,
                 {config.intermediate_size, split.intermediate_begin, split.intermediate},
                 config.mlp_bias && first_rank));
  return layer;
}

Result<LlamaHead> LoadLlamaHead(const ModelConfig& config, const Checkpoint& checkpoint,
                                const LlamaSplit& split) {
  LlamaHead head;
  KVRELAY_RETURN_IF_ERROR(ReadNorm(checkpoint, "model.norm.weight", config.hidden_size, head.norm));
  if (config.tie_word_embeddings) return head;
  const uint32_t rows = split.vocab_end - split.vocab_begin;
  head.own = Matrix(rows, config.hidden_size);
  KVRELAY_RETURN_IF_ERROR(ReadRows(checkpoint, "lm_head.weight", config.vocab_size,
                                   config.hidden_size, split.vocab_begin, rows, head.own.values));
  return head;
}

Result<LlamaWeights> LoadLlamaWeights(const ModelConfig& config, const Checkpoint& checkpoint,
                                      const LlamaSplit& split,
                                      std::shared_ptr<const Matrix> embedding) {
  LlamaWeights weights;
  weights.embedding = std::move(embedding);
  for (uint32_t layer = split.kv.layer_begin; layer < split.kv.layer_end(); ++layer) {
    KVRELAY_ASSIGN_OR_RETURN(LlamaLayer loaded, LoadLlamaLayer(config, checkpoint, layer, split));
    weights.layers.push_back(std::move(loaded));
  }
  if (!split.last_stage()) return weights;
  KVRELAY_ASSIGN_OR_RETURN(weights.head, LoadLlamaHead(config, checkpoint, split));
  weights.head_rows =
      config.tie_word_embeddings
          ? weights.embedding->values.data() + size_t{split.vocab_begin} * config.hidden_size
          : weights.head.own.values.data();
  return weights;
}

}  // namespace kvrelay::engine
