#include "engine/model_config.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string_view>

#include "engine/json_fields.h"
#include "engine/llama_family.h"
#include "engine/model_file.h"

namespace kvrelay::engine {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxConfigBytes = 16U << 20;
constexpr uint32_t kMaxLayers = 255;
constexpr uint32_t kMaxDim = 1U << 24;
constexpr uint32_t kMaxPositions = 1U << 28;  // a lease's progress word counts tokens in 28 bits

// Fields of other members of the family that change what is computed, and the values at which they
// change nothing.
struct Neutral {
  const char* field;
  std::array<json, 2> values;
};
const std::vector<Neutral>& NeutralFields() {
  static const auto* fields = new std::vector<Neutral>{
      {"hidden_act", {"silu", "silu"}},
      {"quantization_config", {json::object(), json::object()}},
      {"partial_rotary_factor", {1, 1.0}},
      {"attn_logit_softcapping", {json(), json()}},
      {"final_logit_softcapping", {json(), json()}},
      {"logits_scaling", {1, 1.0}},
      {"logit_scale", {1, 1.0}},
      {"embedding_multiplier", {1, 1.0}},
      {"residual_multiplier", {1, 1.0}},
      {"attention_multiplier", {json(), json()}},
      {"num_experts", {0, 1}},
      {"num_local_experts", {0, 1}},
      {"use_qk_norm", {false, false}},
      {"is_encoder_decoder", {false, false}},
      {"no_rope_layers", {json::array(), json::array()}},
  };
  return *fields;
}

Status RefuseWhatWeDoNotCompute(const JsonFields& config) {
  for (const Neutral& neutral : NeutralFields()) {
    if (!config.Has(neutral.field)) continue;
    const json& value = config.object()[neutral.field];
    if (value != neutral.values[0] && value != neutral.values[1]) {
      return config.Refuse(neutral.field, "is not supported");
    }
  }
  for (const char* field : {"dtype", "torch_dtype"}) {
    KVRELAY_ASSIGN_OR_RETURN(const std::string dtype, config.StringOr(field, "float32"));
    if (dtype != "float32" && dtype != "float16" && dtype != "bfloat16") {
      return config.Refuse(field, "is not one of float32, float16, bfloat16");
    }
  }
  return Status::Ok();
}

Status CheckRopeKeys(const JsonFields& rope) {
  static constexpr std::array<std::string_view, 7> kKnown = {"rope_type",
                                                             "type",
                                                             "rope_theta",
                                                             "factor",
                                                             "low_freq_factor",
                                                             "high_freq_factor",
                                                             "original_max_position_embeddings"};
  for (const auto& [key, value] : rope.object().items()) {
    const bool known = std::ranges::find(kKnown, std::string_view(key)) != kKnown.end();
    const bool whole = key == "partial_rotary_factor" && value == 1.0;
    if (!known && !whole && !value.is_null()) return rope.Refuse(key, "is not supported");
  }
  return Status::Ok();
}

Result<RopeConfig> ParseRope(const JsonFields& config) {
  RopeConfig out;
  const bool has_top_theta = config.Has("rope_theta");
  KVRELAY_ASSIGN_OR_RETURN(out.theta, config.PositiveOr("rope_theta", out.theta));
  const char* field = config.Has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  KVRELAY_ASSIGN_OR_RETURN(const std::optional<JsonFields> rope, config.Object(field));
  if (!rope) return out;
  KVRELAY_RETURN_IF_ERROR(CheckRopeKeys(*rope));

  if (rope->Has("rope_theta")) {
    KVRELAY_ASSIGN_OR_RETURN(const double theta, rope->Positive("rope_theta"));
    if (has_top_theta && theta != out.theta) {
      return Error(config.Refuse("rope_theta", "differs from " + std::string(field) +
                                                   ".rope_theta = " + std::to_string(theta)));
    }
    out.theta = theta;
  }
  KVRELAY_ASSIGN_OR_RETURN(const std::string old_name, rope->StringOr("type", "default"));
  KVRELAY_ASSIGN_OR_RETURN(const std::string type, rope->StringOr("rope_type", old_name));
  if (type == "default") return out;
  if (type != "llama3") {
    return Error(rope->Refuse(rope->Has("rope_type") ? "rope_type" : "type",
                              "is not one of default, llama3"));
  }
  out.type = RopeConfig::Type::kLlama3;
  KVRELAY_ASSIGN_OR_RETURN(out.factor, rope->Positive("factor"));
  KVRELAY_ASSIGN_OR_RETURN(out.low_freq_factor, rope->Positive("low_freq_factor"));
  KVRELAY_ASSIGN_OR_RETURN(out.high_freq_factor, rope->Positive("high_freq_factor"));
  KVRELAY_ASSIGN_OR_RETURN(out.original_max_position,
                           rope->Uint("original_max_position_embeddings", 1, kMaxPositions));
  if (out.high_freq_factor <= out.low_freq_factor) {
    return Error(rope->Refuse("high_freq_factor", "is not above low_freq_factor = " +
                                                      std::to_string(out.low_freq_factor)));
  }
  return out;
}

Status ParseHeads(const JsonFields& config, const LlamaFamily& family, ModelConfig& out) {
  // Null stands for all heads with every member, an absent field not.
  const bool silent = !config.object().contains("num_key_value_heads");
  const uint32_t kv_heads_absent =
      silent && family.num_kv_heads > 0 ? family.num_kv_heads : out.num_heads;
  KVRELAY_ASSIGN_OR_RETURN(const uint64_t kv_heads,
                           config.UintOr("num_key_value_heads", 1, out.num_heads, kv_heads_absent));
  out.num_kv_heads = static_cast<uint32_t>(kv_heads);
  if (out.num_kv_heads > out.num_heads || out.num_heads % out.num_kv_heads != 0) {
    return config.Refuse(
        "num_key_value_heads",
        (silent ? "means " + std::to_string(out.num_kv_heads) + " and " : "") +
            "does not divide num_attention_heads = " + std::to_string(out.num_heads));
  }
  if (!config.Has("head_dim") && family.head_dim == 0 && out.hidden_size % out.num_heads != 0) {
    return config.Refuse(
        "head_dim", "cannot be derived: num_attention_heads = " + std::to_string(out.num_heads) +
                        " does not divide hidden_size = " + std::to_string(out.hidden_size));
  }
  const uint32_t head_dim_absent =
      family.head_dim > 0 ? family.head_dim : out.hidden_size / out.num_heads;
  KVRELAY_ASSIGN_OR_RETURN(const uint64_t head_dim,
                           config.UintOr("head_dim", 2, 1U << 12, head_dim_absent));
  out.head_dim = static_cast<uint32_t>(head_dim);
  if (out.head_dim == 0 || out.head_dim % 2 != 0) {
    return config.Refuse("head_dim", "gives heads of " + std::to_string(out.head_dim) +
                                         " elements; rotary positions need an even number");
  }
  return Status::Ok();
}

Status ParseShape(const JsonFields& config, const LlamaFamily& family, ModelConfig& out) {
  struct Dim {
    const char* field;
    uint64_t max;
    uint32_t* value;
  };
  const Dim dims[] = {{"vocab_size", kMaxDim, &out.vocab_size},
                      {"hidden_size", kMaxDim, &out.hidden_size},
                      {"intermediate_size", kMaxDim, &out.intermediate_size},
                      {"num_hidden_layers", kMaxLayers, &out.num_layers},
                      {"num_attention_heads", 1U << 16, &out.num_heads},
                      {"max_position_embeddings", kMaxPositions - 1, &out.max_position}};
  for (const Dim& dim : dims) {
    KVRELAY_ASSIGN_OR_RETURN(const uint64_t value, config.Uint(dim.field, 1, dim.max));
    *dim.value = static_cast<uint32_t>(value);
  }
  if (family.mla) {
    KVRELAY_ASSIGN_OR_RETURN(out.mla, ParseMla(config, out.num_layers, out.num_heads));
    out.num_kv_heads = 1;
    out.head_dim = out.mla->row_dim();
    return Status::Ok();
  }
  return ParseHeads(config, family, out);
}

Result<std::string> ParseArchitecture(const JsonFields& config) {
  if (config.Has("architectures")) {
    const json& list = config.object()["architectures"];
    if (!list.is_array() || list.size() != 1 || !list[0].is_string()) {
      return Error(config.Refuse("architectures", "is not a list of one name"));
    }
    return list[0].get<std::string>();
  }
  KVRELAY_ASSIGN_OR_RETURN(const std::string type, config.StringOr("model_type", ""));
  const LlamaFamily* const family = LlamaFamily::OfType(type);
  if (family == nullptr) {
    return Error(
        config.Refuse("model_type", "is not one of llama, mistral, qwen2, qwen3, deepseek_v2"));
  }
  return std::string(family->architecture);
}

}  // namespace

std::string ModelConfig::Canonical() const {
  json out = {{"architecture", architecture},
              {"vocab_size", vocab_size},
              {"hidden_size", hidden_size},
              {"intermediate_size", intermediate_size},
              {"num_layers", num_layers},
              {"num_heads", num_heads},
              {"num_kv_heads", num_kv_heads},
              {"head_dim", head_dim},
              {"max_position", max_position},
              {"rms_norm_eps", rms_norm_eps},
              {"tie_word_embeddings", tie_word_embeddings},
              {"rope_theta", rope.theta}};
  if (rope.type == RopeConfig::Type::kLlama3) {
    out["rope_llama3"] = {rope.factor, rope.low_freq_factor, rope.high_freq_factor,
                          rope.original_max_position};
  }
  // Only where they are on: models without them keep their names.
  if (qkv_bias) out["qkv_bias"] = true;
  if (o_bias) out["o_bias"] = true;
  if (mlp_bias) out["mlp_bias"] = true;
  if (qk_norm) out["qk_norm"] = true;
  if (!windows.empty()) out["windows"] = windows;
  if (mla) {
    out["mla"] = {mla->q_lora_rank, mla->kv_lora_rank, mla->nope_dim, mla->rope_dim, mla->v_dim};
  }
  return out.dump();
}

Result<ModelConfig> ParseModelConfig(const std::string& config_json, const std::string& where,
                                     const std::string& generation_json) {
  KVRELAY_ASSIGN_OR_RETURN(const JsonFields config, JsonFields::Parse(config_json, where));
  ModelConfig out;
  KVRELAY_ASSIGN_OR_RETURN(out.architecture, ParseArchitecture(config));
  KVRELAY_RETURN_IF_ERROR(RefuseWhatWeDoNotCompute(config));
  const LlamaFamily& family = LlamaFamily::OfArchitecture(out.architecture);
  KVRELAY_RETURN_IF_ERROR(ParseShape(config, family, out));
  KVRELAY_RETURN_IF_ERROR(family.ParseSwitches(config, out));
  KVRELAY_ASSIGN_OR_RETURN(out.rms_norm_eps, config.PositiveOr("rms_norm_eps", 1e-6));
  KVRELAY_ASSIGN_OR_RETURN(out.tie_word_embeddings, config.BoolOr("tie_word_embeddings", false));
  KVRELAY_ASSIGN_OR_RETURN(out.rope, ParseRope(config));
  KVRELAY_ASSIGN_OR_RETURN(out.eos_ids, config.Ids("eos_token_id"));
  if (config.Has("bos_token_id")) {
    KVRELAY_ASSIGN_OR_RETURN(const uint64_t bos,
                             config.Uint("bos_token_id", 0, out.vocab_size - 1));
    out.bos_id = static_cast<uint32_t>(bos);
  }
  if (!generation_json.empty()) {
    KVRELAY_ASSIGN_OR_RETURN(const JsonFields generation,
                             JsonFields::Parse(generation_json, "generation_config.json"));
    KVRELAY_ASSIGN_OR_RETURN(const std::vector<uint32_t> more, generation.Ids("eos_token_id"));
    out.eos_ids.insert(out.eos_ids.end(), more.begin(), more.end());
  }
  std::sort(out.eos_ids.begin(), out.eos_ids.end());
  out.eos_ids.erase(std::unique(out.eos_ids.begin(), out.eos_ids.end()), out.eos_ids.end());
  return out;
}

Result<ModelConfig> LoadModelConfig(const std::string& model_dir) {
  const std::string path = model_dir + "/config.json";
  KVRELAY_ASSIGN_OR_RETURN(const std::string config, ReadTextFile(path, kMaxConfigBytes));
  Result<std::string> generation =
      ReadTextFile(model_dir + "/generation_config.json", kMaxConfigBytes);
  if (!generation && generation.error().code() != Code::kNotFound) {
    return Error(std::move(generation).error());
  }
  return ParseModelConfig(config, path, generation ? *generation : std::string());
}

}  // namespace kvrelay::engine
