// Scales of caches whose numbers have one byte: how large the numbers are that a model writes is
// measured once, at start.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/engine_options.h"
#include "engine/kv_memory.h"
#include "engine/model_config.h"
#include "kvcache/layout.h"

namespace kvrelay::engine {

// Whether caches of these options have scales: those of one byte a number, unless it is switched
// off.
bool WantsScales(const EngineOptions& options);

// Token ids to measure with, the same for the same model: a sequence as long as the context allows,
// at most 256.
std::vector<uint32_t> SampleTokens(const ModelConfig& config);

// The scales of each rank for numbers of `dtype`, from the first `tokens` tokens that all layers
// have in `blocks` of the fp32 caches `ranks`: the least power of two with which a quarter more
// than the largest number seen can be stored, for each KV head or for each tensor of the model. A
// power of two, because multiplying by it is exact, and because ranks that add up in another order
// then find the same.
std::vector<KvScales> MeasureScales(std::span<const KvRank> ranks, std::span<const BlockId> blocks,
                                    uint32_t tokens, DType dtype, KvScaling scaling);

}  // namespace kvrelay::engine
