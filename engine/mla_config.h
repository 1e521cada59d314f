// What config.json says of multi-head latent attention.
#pragma once

#include <cstdint>

#include "base/status.h"
#include "engine/json_fields.h"

namespace kvrelay::engine {

// Keys and values of all heads are made from one latent per token; beside it, one key with the
// position. Queries have a part for either.
struct MlaConfig {
  uint32_t q_lora_rank =
      0;  // queries are made from a latent of this many elements; 0: from the row
  uint32_t kv_lora_rank = 0;
  uint32_t nope_dim = 0;  // of a head's query, without position
  uint32_t rope_dim = 0;  // even
  uint32_t v_dim = 0;
  bool operator==(const MlaConfig&) const = default;

  uint32_t qk_dim() const { return nope_dim + rope_dim; }
  uint32_t row_dim() const { return kv_lora_rank + rope_dim; }  // of the cache
};

// kInvalidArgument also for what is not supported: layers with experts, KV heads.
Result<MlaConfig> ParseMla(const JsonFields& config, uint32_t num_layers, uint32_t num_heads);

}  // namespace kvrelay::engine
