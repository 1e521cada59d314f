// The members of the Llama family, as their config.json differs: which switches each of them knows,
// and what transformers takes for granted where a field is absent.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/status.h"
#include "engine/json_fields.h"
#include "engine/model_config.h"

namespace kvrelay::engine {

struct LlamaFamily {
  enum class Bias : uint8_t {
    kNone,
    kQkv,     // always, and only there
    kSwitch,  // attention_bias: Q, K, V and O
  };
  enum class Windows : uint8_t {
    kNone,
    kAllLayers,   // sliding_window
    kSomeLayers,  // use_sliding_window, sliding_window, layer_types or max_window_layers
  };

  const char* architecture;  // "LlamaForCausalLM"
  const char* model_type;    // "llama"
  uint32_t num_kv_heads;     // where absent; 0: num_attention_heads
  uint32_t head_dim;         // where absent; 0: hidden_size / num_attention_heads
  Bias attention_bias;
  bool mlp_bias;  // knows this switch
  bool qk_norm;
  Windows windows;
  bool mla;  // instead of KV heads

  // The member of that name; for names that nobody has, Llama itself.
  static const LlamaFamily& OfArchitecture(std::string_view name);
  // Null when there is no member of this model_type.
  static const LlamaFamily* OfType(std::string_view model_type);

  // Reads biases, norms and windows into `out`, whose shape is known. kInvalidArgument for switches
  // that this member does not know and that are on.
  Status ParseSwitches(const JsonFields& config, ModelConfig& out) const;

 private:
  Status ParseBiases(const JsonFields& config, ModelConfig& out) const;
  Status ParseWindows(const JsonFields& config, ModelConfig& out) const;
  Result<uint32_t> ParseWindow(const JsonFields& config, const ModelConfig& model) const;
};

}  // namespace kvrelay::engine
