#include "engine/mla_config.h"

#include <nlohmann/json.hpp>
#include <string>

namespace kvrelay::engine {
namespace {

constexpr uint64_t kMaxLatent = 1U << 14;
constexpr uint64_t kMaxHeadDim = 1U << 12;

// All layers are dense.
Status CheckExperts(const JsonFields& config, uint32_t num_layers) {
  KVRELAY_ASSIGN_OR_RETURN(const uint64_t dense,
                           config.UintOr("first_k_dense_replace", 0, UINT32_MAX, 0));
  if (dense >= num_layers) return Status::Ok();
  return config.Refuse("first_k_dense_replace",
                       "leaves some of num_hidden_layers = " + std::to_string(num_layers) +
                           " to experts, which are not supported");
}

}  // namespace

Result<MlaConfig> ParseMla(const JsonFields& config, uint32_t num_layers, uint32_t num_heads) {
  KVRELAY_RETURN_IF_ERROR(CheckExperts(config, num_layers));
  KVRELAY_ASSIGN_OR_RETURN(const uint64_t kv_heads,
                           config.UintOr("num_key_value_heads", 1, UINT32_MAX, num_heads));
  if (kv_heads != num_heads) {
    return Error(config.Refuse("num_key_value_heads",
                               "is not num_attention_heads = " + std::to_string(num_heads)));
  }
  MlaConfig out;
  struct Dim {
    const char* field;
    uint64_t most;
    uint64_t absent;
    uint32_t* value;
  };
  const Dim dims[] = {{"q_lora_rank", kMaxLatent, 1536, &out.q_lora_rank},
                      {"kv_lora_rank", kMaxLatent, 512, &out.kv_lora_rank},
                      {"qk_nope_head_dim", kMaxHeadDim, 128, &out.nope_dim},
                      {"qk_rope_head_dim", kMaxHeadDim, 64, &out.rope_dim},
                      {"v_head_dim", kMaxHeadDim, 128, &out.v_dim}};
  for (const Dim& dim : dims) {
    KVRELAY_ASSIGN_OR_RETURN(const uint64_t value,
                             config.UintOr(dim.field, 1, dim.most, dim.absent));
    *dim.value = static_cast<uint32_t>(value);
  }
  // Null says that there is no latent of queries; only an absent field means the default.
  if (config.object().contains("q_lora_rank") && !config.Has("q_lora_rank")) out.q_lora_rank = 0;
  if (out.rope_dim % 2 != 0) {
    return Error(config.Refuse("qk_rope_head_dim", "is odd; rotary positions need an even number"));
  }
  return out;
}

}  // namespace kvrelay::engine
