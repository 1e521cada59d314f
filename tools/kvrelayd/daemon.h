// The life of one kvrelayd: engine, agents and worker, from the ready line to the end of draining.
#pragma once

#include <functional>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <variant>

#include "agent/engine_agent.h"
#include "engine/decode_worker.h"
#include "engine/engine.h"
#include "engine/prefill_worker.h"
#include "tools/common/stop_signals.h"
#include "tools/kvrelayd/describe_daemon.h"
#include "tools/kvrelayd/options.h"

namespace kvrelay::tools {

// Owned by the main thread.
class Daemon {
 public:
  // Loads the model, allocates the cache, binds, and starts all threads: requests are taken when it
  // returns. `options` passed Check. Errors are the configuration's (see SetupExitCodeOf), except
  // kInternal.
  static Result<std::unique_ptr<Daemon>> Start(const DaemonOptions& options,
                                               std::vector<EffectiveFlag> flags);
  // Ends what is left, in bounded time.
  ~Daemon();

  // {"schema":1,"ready":true,"role":"prefill","endpoint":"tcp://127.0.0.1:41234",...}, without a
  // newline. For decode it waits a moment until the prefill daemons are known to be there or not.
  std::string ReadyLine();

  // Serves until the first signal, then drains: refuses new work, lets open requests and leases end
  // for at most `drain`, ends the rest with errors. Returns how many that were.
  size_t Serve(const StopSignals& signals, Duration drain);

 private:
  using Worker =
      std::variant<std::unique_ptr<engine::PrefillWorker>, std::unique_ptr<engine::DecodeWorker>>;

  explicit Daemon(DaemonFacts facts) : facts_(std::move(facts)) {}
  Status OpenEngine(const DaemonOptions& options);
  Status OpenAgent(const DaemonOptions& options);
  void HandleQuestions();
  // One line: versions, what it serves, by which paths.
  void LogStart();

  // Control thread.
  proto::HealthReply Health();
  void AnswerDescribe(const agent::ResponderPtr& responder);
  template <typename Fn>
  auto WithWorker(Fn fn) {
    return std::visit([&fn](auto& worker) { return fn(*worker); }, worker_);
  }

  // Main thread: runs `fn` on the control thread and waits. Nothing when the control thread does
  // not come to it.
  template <typename Fn>
  auto OnControl(Fn fn) -> std::optional<decltype(fn())>;

  const DaemonFacts facts_;
  // The worker refers to the agent and the engine, the agent to the engine's memory; their threads
  // end in ~Daemon.
  std::unique_ptr<engine::Engine> engine_;
  std::unique_ptr<agent::EngineAgent> agent_;
  Worker worker_;
};

}  // namespace kvrelay::tools
