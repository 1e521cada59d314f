// What a Hugging Face model folder says about its model, checked: config.json in the spelling of
// transformers 4 (rope_theta, rope_scaling, torch_dtype) and of 5 (rope_parameters, dtype), and the
// eos ids of generation_config.json.
//
// Everything that would change the arithmetic and that we do not compute is refused
// (kInvalidArgument) with the field and its value; fields that we do not know are taken as notes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/mla_config.h"

namespace kvrelay::engine {

struct RopeConfig {
  enum class Type : uint8_t { kDefault, kLlama3 };
  Type type = Type::kDefault;
  double theta = 10000;
  // kLlama3 only.
  double factor = 1;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  uint32_t original_max_position = 0;
  bool operator==(const RopeConfig&) const = default;
};

struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM": see llama_family.h
  uint32_t vocab_size = 0;
  uint32_t hidden_size = 0;
  uint32_t intermediate_size = 0;
  uint32_t num_layers = 0;  // at most 255: a lease's progress word counts layers in 8 bits
  uint32_t num_heads = 0;
  uint32_t num_kv_heads = 0;  // divides num_heads; of MLA 1, the latent
  uint32_t head_dim = 0;      // even; num_heads * head_dim need not be hidden_size; of MLA a row of
                              // the cache
  uint32_t max_position = 0;  // tokens of prompt and answer together
  double rms_norm_eps = 0;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;  // each head of Q and K is normalised before it turns
  // By layer, how many tokens a token sees, itself included; 0: all. Empty: all layers see all.
  std::vector<uint32_t> windows;
  RopeConfig rope;
  std::optional<MlaConfig> mla;
  std::vector<uint32_t> eos_ids;  // sorted, unique; may be empty
  std::optional<uint32_t> bos_id;
  bool operator==(const ModelConfig&) const = default;

  uint32_t rope_dim() const { return mla ? mla->rope_dim : head_dim; }
  uint32_t window(uint32_t layer) const { return windows.empty() ? 0 : windows[layer]; }
  // Equal for models that compute the same from the same weights; part of the fingerprint. Leaves
  // out eos and bos.
  std::string Canonical() const;
};

// `where` names the file in messages; `generation_json` may be empty.
Result<ModelConfig> ParseModelConfig(const std::string& config_json, const std::string& where,
                                     const std::string& generation_json);

// Reads config.json (kNotFound when the folder or the file is absent) and, where it exists,
// generation_config.json.
Result<ModelConfig> LoadModelConfig(const std::string& model_dir);

}  // namespace kvrelay::engine
