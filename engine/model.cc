#include "engine/model.h"

#include <algorithm>

#include "engine/llama.h"
#include "kvcache/shard.h"

namespace kvrelay::engine {
namespace {

struct Architecture {
  const char* name;
  ModelBuilder build;
};
constexpr Architecture kArchitectures[] = {{"LlamaForCausalLM", BuildLlama},
                                           {"MistralForCausalLM", BuildLlama},
                                           {"Qwen2ForCausalLM", BuildLlama},
                                           {"Qwen3ForCausalLM", BuildLlama},
                                           {"DeepseekV2ForCausalLM", BuildLlama}};

}  // namespace

Result<ModelBuilder> FindArchitecture(const ModelConfig& config) {
  std::string known;
  for (const Architecture& architecture : kArchitectures) {
    if (config.architecture == architecture.name) return architecture.build;
    known += known.empty() ? "" : ", ";
    known += architecture.name;
  }
  return Error(Code::kInvalidArgument, "architectures = [\"" + config.architecture +
                                           "\"] is not supported; supported: " + known);
}

Status CheckTensorParallel(const ModelConfig& config, uint32_t tp_size) {
  const auto divides = [&](const char* field, uint32_t value) -> Status {
    if (tp_size > 0 && value % tp_size == 0) return Status::Ok();
    return {Code::kInvalidArgument, "tp = " + std::to_string(tp_size) + " does not divide " +
                                        field + " = " + std::to_string(value)};
  };
  KVRELAY_RETURN_IF_ERROR(divides("num_attention_heads", config.num_heads));
  KVRELAY_RETURN_IF_ERROR(divides("intermediate_size", config.intermediate_size));
  const uint32_t more = std::max(tp_size, config.num_kv_heads);
  const uint32_t fewer = std::min(tp_size, config.num_kv_heads);
  if (more % fewer != 0) {
    return {Code::kInvalidArgument,
            "tp = " + std::to_string(tp_size) + " and num_key_value_heads = " +
                std::to_string(config.num_kv_heads) + ": neither divides the other"};
  }
  return Status::Ok();
}

}  // namespace kvrelay::engine
