// The model in this process: what a daemon's answers are compared with. No agent, no transfer.
#pragma once

#include <memory>

#include "engine/engine.h"
#include "tools/common/engine_flags.h"
#include "tools/kvrelay/answer.h"

namespace kvrelay::tools {

class LocalEngine {
 public:
  // Errors as OpenPlatform and engine::Engine::Create.
  static Result<LocalEngine> Open(const EngineFlags& flags);

  const engine::Engine& engine() const { return *engine_; }

  // The same request and answer as a decode daemon's. Any thread; several at once share the batch.
  // Blocks until the answer is complete, the request's deadline, or a signal (kCancelled).
  Result<Answer> Generate(const proto::Generate& request, const StopSignals& signals,
                          const OnTokens& on_tokens);

 private:
  explicit LocalEngine(std::unique_ptr<engine::Engine> engine) : engine_(std::move(engine)) {}
  std::unique_ptr<engine::Engine> engine_;
};

}  // namespace kvrelay::tools
