#include "engine/llama_weights.h"

#include <string>
#include <utility>

#include "engine/model.h"

namespace kvrelay::engine {
namespace {

// Rows [begin, begin + count) of a weight matrix into `out` (column-parallel).
Status ReadRows(const Checkpoint& checkpoint, const std::string& name, uint64_t all_rows,
                uint64_t columns, uint64_t begin, uint64_t count, std::span<float> out) {
  return checkpoint.ReadMatrix(
      name, all_rows, columns,
      {.row_begin = begin, .rows = count, .column_begin = 0, .columns = columns}, out);
}

// Columns [begin, begin + count) of a weight matrix (row-parallel).
Result<Matrix> ReadColumns(const Checkpoint& checkpoint, const std::string& name, uint64_t rows,
                           uint64_t all_columns, uint64_t begin, uint64_t count) {
  Matrix out(rows, count);
  KVRELAY_RETURN_IF_ERROR(checkpoint.ReadMatrix(
      name, rows, all_columns,
      {.row_begin = 0, .rows = rows, .column_begin = begin, .columns = count}, out.values));
  return out;
}

Result<Matrix> ReadQkv(const ModelConfig& config, const Checkpoint& checkpoint,
                       const std::string& prefix, const LlamaSplit& split) {
  const uint64_t dim = config.head_dim;
  const uint64_t q_rows = split.query_heads * dim;
  const uint64_t kv_rows = split.kv.head_count * dim;
  Matrix out(q_rows + 2 * kv_rows, config.hidden_size);
  KVRELAY_RETURN_IF_ERROR(ReadRows(checkpoint, prefix + "q_proj.weight", config.num_heads * dim,
                                   config.hidden_size, split.query_head_begin * dim, q_rows,
                                   out.Rows(0, q_rows)));
  uint64_t row = q_rows;
  for (const char* name : {"k_proj.weight", "v_proj.weight"}) {
    KVRELAY_RETURN_IF_ERROR(ReadRows(checkpoint, prefix + name, config.num_kv_heads * dim,
                                     config.hidden_size, split.kv.head_begin * dim, kv_rows,
                                     out.Rows(row, kv_rows)));
    row += kv_rows;
  }
  return out;
}

Result<Matrix> ReadGateUp(const ModelConfig& config, const Checkpoint& checkpoint,
                          const std::string& prefix, const LlamaSplit& split) {
  Matrix out(size_t{2} * split.intermediate, config.hidden_size);
  size_t row = 0;
  for (const char* name : {"gate_proj.weight", "up_proj.weight"}) {
    KVRELAY_RETURN_IF_ERROR(ReadRows(checkpoint, prefix + name, config.intermediate_size,
                                     config.hidden_size, split.intermediate_begin,
                                     split.intermediate, out.Rows(row, split.intermediate)));
    row += split.intermediate;
  }
  return out;
}

Result<LlamaLayer> ReadLayer(const ModelConfig& config, const Checkpoint& checkpoint,
                             const std::string& prefix, const LlamaSplit& split) {
  LlamaLayer layer;
  layer.input_norm.resize(config.hidden_size);
  layer.post_norm.resize(config.hidden_size);
  KVRELAY_RETURN_IF_ERROR(
      checkpoint.ReadVector(prefix + "input_layernorm.weight", layer.input_norm));
  KVRELAY_RETURN_IF_ERROR(
      checkpoint.ReadVector(prefix + "post_attention_layernorm.weight", layer.post_norm));
  KVRELAY_ASSIGN_OR_RETURN(layer.qkv, ReadQkv(config, checkpoint, prefix + "self_attn.", split));
  KVRELAY_ASSIGN_OR_RETURN(
      layer.o, ReadColumns(checkpoint, prefix + "self_attn.o_proj.weight", config.hidden_size,
                           uint64_t{config.num_heads} * config.head_dim,
                           uint64_t{split.query_head_begin} * config.head_dim,
                           uint64_t{split.query_heads} * config.head_dim));
  KVRELAY_ASSIGN_OR_RETURN(layer.gate_up, ReadGateUp(config, checkpoint, prefix + "mlp.", split));
  KVRELAY_ASSIGN_OR_RETURN(layer.down, ReadColumns(checkpoint, prefix + "mlp.down_proj.weight",
                                                   config.hidden_size, config.intermediate_size,
                                                   split.intermediate_begin, split.intermediate));
  return layer;
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

Result<LlamaWeights> LoadLlamaWeights(const ModelConfig& config, const Checkpoint& checkpoint,
                                      const LlamaSplit& split,
                                      std::shared_ptr<const Matrix> embedding) {
  LlamaWeights weights;
  weights.embedding = std::move(embedding);
  for (uint32_t layer = split.kv.layer_begin; layer < split.kv.layer_end(); ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    KVRELAY_ASSIGN_OR_RETURN(LlamaLayer loaded, ReadLayer(config, checkpoint, prefix, split));
    weights.layers.push_back(std::move(loaded));
  }
  if (!split.last_stage()) return weights;
  weights.final_norm.resize(config.hidden_size);
  KVRELAY_RETURN_IF_ERROR(checkpoint.ReadVector("model.norm.weight", weights.final_norm));
  if (config.tie_word_embeddings) {
    weights.head =
        weights.embedding->values.data() + size_t{split.vocab_begin} * config.hidden_size;
    return weights;
  }
  const uint32_t rows = split.vocab_end - split.vocab_begin;
  weights.own_head = Matrix(rows, config.hidden_size);
  KVRELAY_RETURN_IF_ERROR(ReadRows(checkpoint, "lm_head.weight", config.vocab_size,
                                   config.hidden_size, split.vocab_begin, rows,
                                   weights.own_head.values));
  weights.head = weights.own_head.values.data();
  return weights;
}

}  // namespace kvrelay::engine
