#include "engine/llama_family.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

namespace kvrelay::engine {
namespace {

constexpr uint32_t kDefaultWindow = 4096;
constexpr uint32_t kDefaultMaxWindowLayers = 28;

using Bias = LlamaFamily::Bias;
using Windows = LlamaFamily::Windows;

constexpr LlamaFamily kMembers[] = {
    {.architecture = "LlamaForCausalLM",
     .model_type = "llama",
     .num_kv_heads = 0,
     .head_dim = 0,
     .attention_bias = Bias::kSwitch,
     .mlp_bias = true,
     .qk_norm = false,
     .windows = Windows::kNone,
     .mla = false},
    {.architecture = "MistralForCausalLM",
     .model_type = "mistral",
     .num_kv_heads = 8,
     .head_dim = 0,
     .attention_bias = Bias::kNone,
     .mlp_bias = false,
     .qk_norm = false,
     .windows = Windows::kAllLayers,
     .mla = false},
    {.architecture = "Qwen2ForCausalLM",
     .model_type = "qwen2",
     .num_kv_heads = 32,
     .head_dim = 0,
     .attention_bias = Bias::kQkv,
     .mlp_bias = false,
     .qk_norm = false,
     .windows = Windows::kSomeLayers,
     .mla = false},
    {.architecture = "Qwen3ForCausalLM",
     .model_type = "qwen3",
     .num_kv_heads = 32,
     .head_dim = 128,
     .attention_bias = Bias::kSwitch,
     .mlp_bias = false,
     .qk_norm = true,
     .windows = Windows::kSomeLayers,
     .mla = false},
    {.architecture = "DeepseekV2ForCausalLM",
     .model_type = "deepseek_v2",
     .num_kv_heads = 0,
     .head_dim = 0,
     .attention_bias = Bias::kNone,
     .mlp_bias = false,
     .qk_norm = false,
     .windows = Windows::kNone,
     .mla = true},
};

// Which layers have a window, as `layer_types` says.
Result<std::vector<bool>> ParseLayerTypes(const JsonFields& config, uint32_t num_layers) {
  const nlohmann::json& list = config.object()["layer_types"];
  std::vector<bool> windows;
  for (const auto& type : list) {
    if (type != "full_attention" && type != "sliding_attention") {
      return Error(config.Refuse("layer_types", "is not supported"));
    }
    windows.push_back(type == "sliding_attention");
  }
  if (!list.is_array() || windows.size() != num_layers) {
    return Error(config.Refuse("layer_types", "is not a list of num_hidden_layers = " +
                                                  std::to_string(num_layers) + " names"));
  }
  return windows;
}

}  // namespace

const LlamaFamily& LlamaFamily::OfArchitecture(std::string_view name) {
  const auto* found = std::ranges::find_if(
      kMembers, [name](const LlamaFamily& member) { return name == member.architecture; });
  return found == std::end(kMembers) ? kMembers[0] : *found;
}

const LlamaFamily* LlamaFamily::OfType(std::string_view model_type) {
  const auto* found = std::ranges::find_if(
      kMembers, [=](const LlamaFamily& member) { return model_type == member.model_type; });
  return found == std::end(kMembers) ? nullptr : found;
}

Status LlamaFamily::ParseBiases(const JsonFields& config, ModelConfig& out) const {
  // Where it is no switch transformers does not read it: Qwen2 has its biases whatever it says.
  KVRELAY_ASSIGN_OR_RETURN(const bool attention, config.BoolOr("attention_bias", false));
  if (attention && attention_bias == Bias::kNone) {
    return config.Refuse("attention_bias", "is not supported");
  }
  out.qkv_bias = attention_bias == Bias::kQkv || attention;
  out.o_bias = attention_bias == Bias::kSwitch && attention;
  KVRELAY_ASSIGN_OR_RETURN(out.mlp_bias, config.BoolOr("mlp_bias", false));
  if (out.mlp_bias && !mlp_bias) return config.Refuse("mlp_bias", "is not supported");
  return Status::Ok();
}

Result<uint32_t> LlamaFamily::ParseWindow(const JsonFields& config,
                                          const ModelConfig& model) const {
  if (windows == Windows::kNone) {
    if (config.Has("sliding_window")) {
      return Error(config.Refuse("sliding_window", "is not supported"));
    }
    return 0;
  }
  const bool all = windows == Windows::kAllLayers;
  KVRELAY_ASSIGN_OR_RETURN(const bool used, config.BoolOr("use_sliding_window", all));
  // Null means none; only a field that is not there at all means the default.
  const bool null = config.object().contains("sliding_window") && !config.Has("sliding_window");
  if (!used || null) return 0;
  KVRELAY_ASSIGN_OR_RETURN(const uint64_t window,
                           config.UintOr("sliding_window", 1, UINT32_MAX, kDefaultWindow));
  // One that is as long as the context hides nothing.
  return window < model.max_position ? static_cast<uint32_t>(window) : 0;
}

Status LlamaFamily::ParseWindows(const JsonFields& config, ModelConfig& out) const {
  KVRELAY_ASSIGN_OR_RETURN(const uint32_t window, ParseWindow(config, out));
  uint64_t first = 0;
  if (windows == Windows::kSomeLayers) {
    KVRELAY_ASSIGN_OR_RETURN(
        first, config.UintOr("max_window_layers", 0, UINT32_MAX, kDefaultMaxWindowLayers));
  }
  std::vector<bool> has_window(out.num_layers);
  for (uint32_t i = 0; i < out.num_layers; ++i) has_window[i] = window > 0 && i >= first;
  if (config.Has("layer_types")) {
    KVRELAY_ASSIGN_OR_RETURN(const std::vector<bool> said, ParseLayerTypes(config, out.num_layers));
    const bool any = std::ranges::find(said, true) != said.end();
    if ((windows != Windows::kSomeLayers && said != has_window) || (any && window == 0)) {
      return config.Refuse("layer_types", "is not supported with the model's sliding_window");
    }
    has_window = said;
  }
  if (std::ranges::find(has_window, true) == has_window.end()) return Status::Ok();
  for (const bool has : has_window) out.windows.push_back(has ? window : 0);
  return Status::Ok();
}

Status LlamaFamily::ParseSwitches(const JsonFields& config, ModelConfig& out) const {
  out.qk_norm = qk_norm;
  KVRELAY_RETURN_IF_ERROR(ParseBiases(config, out));
  return ParseWindows(config, out);
}

}  // namespace kvrelay::engine
