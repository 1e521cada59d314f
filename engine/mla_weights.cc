#include "engine/mla_weights.h"

#include <algorithm>
#include <utility>

#include "engine/read_linear.h"

namespace kvrelay::engine {
namespace {

// From pairs of neighbours (0 1)(2 3)... to two halves 0 2 ... 1 3 ..., as RopeTable has them.
void SplitPairs(Linear& linear, size_t first, size_t count) {
  const size_t columns = linear.weights.columns;
  const std::span<float> rows = linear.weights.Rows(first, count);
  const std::vector<float> pairs(rows.begin(), rows.end());
  for (size_t i = 0; i < count; ++i) {
    const size_t to = i / 2 + (i % 2) * (count / 2);
    std::copy_n(pairs.begin() + static_cast<ptrdiff_t>(i * columns), columns,
                rows.begin() + static_cast<ptrdiff_t>(to * columns));
  }
}

Status ReadQueries(const ModelConfig& config, const Checkpoint& checkpoint,
                   const std::string& prefix, const LlamaSplit& split, MlaLayer& layer) {
  const MlaConfig& mla = *config.mla;
  const uint64_t dim = mla.qk_dim();
  const Part heads = {config.num_heads * dim, split.query_head_begin * dim,
                      split.query_heads * dim};
  if (mla.q_lora_rank > 0) {
    layer.q_a = Linear(mla.q_lora_rank, config.hidden_size, false);
    KVRELAY_RETURN_IF_ERROR(ReadOutputs(checkpoint, prefix + "q_a_proj",
                                        {mla.q_lora_rank, 0, mla.q_lora_rank}, 0, layer.q_a));
    KVRELAY_RETURN_IF_ERROR(
        ReadNorm(checkpoint, prefix + "q_a_layernorm.weight", mla.q_lora_rank, layer.q_a_norm));
  }
  const bool latent = mla.q_lora_rank > 0;
  layer.q = Linear(heads.count, latent ? mla.q_lora_rank : config.hidden_size, false);
  KVRELAY_RETURN_IF_ERROR(
      ReadOutputs(checkpoint, prefix + (latent ? "q_b_proj" : "q_proj"), heads, 0, layer.q));
  for (uint32_t head = 0; head < split.query_heads; ++head) {
    SplitPairs(layer.q, head * dim + mla.nope_dim, mla.rope_dim);
  }
  return Status::Ok();
}

// Of each head's rows in kv_b_proj the first make its keys, the others its values.
Status ReadUp(const ModelConfig& config, const Checkpoint& checkpoint, const std::string& prefix,
              const LlamaSplit& split, MlaLayer& layer) {
  const MlaConfig& mla = *config.mla;
  const uint64_t dim = mla.nope_dim + mla.v_dim;
  const size_t latent = mla.kv_lora_rank;
  Linear up(split.query_heads * dim, latent, false);
  KVRELAY_RETURN_IF_ERROR(
      ReadOutputs(checkpoint, prefix + "kv_b_proj",
                  {config.num_heads * dim, split.query_head_begin * dim, up.weights.rows}, 0, up));
  layer.up_k = Matrix(split.query_heads * latent, mla.nope_dim);
  layer.up_v = Matrix(size_t{split.query_heads} * mla.v_dim, latent);
  for (uint32_t head = 0; head < split.query_heads; ++head) {
    const std::span<const float> k = up.weights.Rows(head * dim, mla.nope_dim);
    const std::span<float> to = layer.up_k.Rows(head * latent, latent);
    for (size_t n = 0; n < mla.nope_dim; ++n) {
      for (size_t c = 0; c < latent; ++c) to[c * mla.nope_dim + n] = k[n * latent + c];
    }
    std::ranges::copy(up.weights.Rows(head * dim + mla.nope_dim, mla.v_dim),
                      layer.up_v.Rows(size_t{head} * mla.v_dim, mla.v_dim).begin());
  }
  return Status::Ok();
}

Result<MlaLayer> ReadMlaLayer(const ModelConfig& config, const Checkpoint& checkpoint,
                              const std::string& prefix, const LlamaSplit& split) {
  const MlaConfig& mla = *config.mla;
  MlaLayer layer;
  KVRELAY_RETURN_IF_ERROR(ReadQueries(config, checkpoint, prefix, split, layer));
  layer.kv_a = Linear(mla.row_dim(), config.hidden_size, false);
  KVRELAY_RETURN_IF_ERROR(ReadOutputs(checkpoint, prefix + "kv_a_proj_with_mqa",
                                      {mla.row_dim(), 0, mla.row_dim()}, 0, layer.kv_a));
  SplitPairs(layer.kv_a, mla.kv_lora_rank, mla.rope_dim);
  KVRELAY_RETURN_IF_ERROR(
      ReadNorm(checkpoint, prefix + "kv_a_layernorm.weight", mla.kv_lora_rank, layer.kv_a_norm));
  KVRELAY_RETURN_IF_ERROR(ReadUp(config, checkpoint, prefix, split, layer));
  const uint64_t dim = mla.v_dim;
  KVRELAY_ASSIGN_OR_RETURN(
      layer.o,
      ReadInputs(checkpoint, prefix + "o_proj", config.hidden_size,
                 {config.num_heads * dim, split.query_head_begin * dim, split.query_heads * dim},
                 false));
  return layer;
}

}  // namespace

Result<std::vector<MlaLayer>> LoadMlaWeights(const ModelConfig& config,
                                             const Checkpoint& checkpoint,
                                             const LlamaSplit& split) {
  std::vector<MlaLayer> layers;
  for (uint32_t layer = split.kv.layer_begin; layer < split.kv.layer_end(); ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".self_attn.";
    KVRELAY_ASSIGN_OR_RETURN(MlaLayer loaded, ReadMlaLayer(config, checkpoint, prefix, split));
    layers.push_back(std::move(loaded));
  }
  return layers;
}

}  // namespace kvrelay::engine
