#include "engine/attn_backend.h"

#include "engine/model.h"
#include "kvcache/shard.h"

namespace kvrelay::engine {

Result<attention::BackendChoice> ChooseAttnBackend(const ModelConfig& config,
                                                   const EngineOptions& options) {
  KVRELAY_RETURN_IF_ERROR(CheckTensorParallel(config, options.tp));
  return attention::GetAttnBackend(
      {.head_dim = config.head_dim,
       .query_heads = config.num_heads / options.tp,
       .kv_heads = KvHeads::Split(config.num_kv_heads, options.tp, 0).count,
       .cache_dtype = options.kv_dtype.value_or(DType::kFp32),
       .block_size = options.block_size,
       .kinds = {.window = !config.windows.empty(), .mla = config.mla.has_value()},
       .relay_enabled = options.relay != RelayMode::kOff,
       .wanted = options.attn_backend});
}

}  // namespace kvrelay::engine
