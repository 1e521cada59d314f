// Which attention backend a model's ranks run on this machine.
#pragma once

#include "attention/backend.h"
#include "base/status.h"
#include "engine/engine_options.h"
#include "engine/model_config.h"

namespace kvrelay::engine {

// For a rank of options.tp, with what all layers ask for together; options.attn_backend overrides
// the order of preference. kInvalidArgument: see CheckTensorParallel, or there is no backend of
// that name. kIncompatible, with each one's reason: none can serve, or the wanted one cannot.
Result<attention::BackendChoice> ChooseAttnBackend(const ModelConfig& config,
                                                   const EngineOptions& options);

}  // namespace kvrelay::engine
