// Names that both daemons derive alone and compare: which model this is, which prompt, which
// prefix. Part of the protocol.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"
#include "engine/checkpoint.h"
#include "engine/model_config.h"

namespace kvrelay::engine {

// The canonical configuration and, by name, every tensor's dtype, shape and content. How the
// tensors are spread over files does not count. Checkpoints of up to 256 MiB count byte by byte; of
// larger ones each tensor counts with 16 evenly spaced windows of 4 KiB (first and last bytes
// included), because reading 100 GB at every start would cost minutes: training touches every row
// of a tensor, so that other weights show there, but a few hand-edited bytes may not.
ContentHash ModelFingerprint(const ModelConfig& config, const Checkpoint& checkpoint);

// The name of the KV of a shared prompt head: whole blocks of token ids under one model.
ContentHash PrefixHash(const ContentHash& model, std::span<const uint32_t> token_ids);
// The names of a prompt's starts, block by block: names[i] is that of its first i + 1 whole blocks.
std::vector<ContentHash> PrefixNames(const ContentHash& model, std::span<const uint32_t> token_ids,
                                     uint32_t block_size);
// The name of a whole prompt (system ids and token ids joined) under one model.
ContentHash PromptHash(const ContentHash& model, std::span<const uint32_t> token_ids);

}  // namespace kvrelay::engine
