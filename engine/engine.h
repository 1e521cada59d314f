// The reference engine: one model, its cache, and a thread that runs requests.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "base/ids.h"
#include "base/status.h"
#include "base/wake_queue.h"
#include "engine/engine_options.h"
#include "engine/model_config.h"
#include "engine/model_runner.h"
#include "engine/platform.h"
#include "engine/request.h"
#include "engine/scheduler.h"
#include "engine/tokenizer.h"
#include "kvcache/conversation_store.h"
#include "kvcache/prefix_store.h"

namespace kvrelay::engine {

// Any thread may call; nothing blocks except Create and Stop. Callbacks of requests run on the
// engine's thread.
class Engine {
 public:
  // Loads the model and allocates the cache. kInvalidArgument: bad flags or a bad model; kNotFound:
  // no model there; kResourceExhausted: no memory for the cache.
  static Result<std::unique_ptr<Engine>> Create(
      const EngineOptions& options, std::shared_ptr<const Platform> platform = HostPlatform());
  // Stop(kCancelled).
  ~Engine();

  // The request's number; its on_done runs once. An error means that nothing happened and no
  // callback runs: kInvalidArgument and kTooLarge as CheckRequest, kOverloaded when max_queue
  // requests wait (besides those that find a free place in the batch), kDraining after Stop.
  Result<RequestNumber> Submit(Request request);
  // For a held request, once its on_admitted has run.
  void Begin(RequestNumber number, engine::Begin begin);
  // Ends a request soon, unless it is over.
  void End(RequestNumber number, const Status& why);
  void Cancel(RequestNumber number) { End(number, {Code::kCancelled, "cancelled"}); }
  // Ends all requests with `why` and joins the thread. Idempotent. Not from a callback.
  void Stop(const Status& why);

  const EngineOptions& options() const { return options_; }
  const ModelConfig& config() const { return runner_->config(); }
  const ContentHash& fingerprint() const { return fingerprint_; }
  const Tokenizer& tokenizer() const { return tokenizer_; }
  const ModelRunner& runner() const { return *runner_; }
  const std::shared_ptr<BlockPool>& pool() const { return runner_->pool(); }
  SystemPrefixStore& prefixes() { return *prefixes_; }
  ConversationStore& conversations() { return *conversations_; }
  // As of the last step.
  SchedulerCounts counts() const;

 private:
  using Command = std::function<void(Scheduler&)>;

  Engine(EngineOptions options, ContentHash fingerprint, Tokenizer tokenizer,
         std::unique_ptr<ModelRunner> runner);
  void Loop();
  // Until a command is there or `until` has come.
  void Sleep(TimePoint until) const;
  void Post(Command command);

  const EngineOptions options_;
  const ContentHash fingerprint_;
  const Tokenizer tokenizer_;
  const std::unique_ptr<ModelRunner> runner_;
  const std::unique_ptr<SystemPrefixStore> prefixes_;
  const std::unique_ptr<ConversationStore> conversations_;
  const RequestLimits limits_;

  WakeQueue<Command> commands_;
  mutable std::mutex mutex_;
  SchedulerCounts counts_;  // under mutex_
  uint32_t unseen_ = 0;  // under mutex_: submitted requests that the scheduler has not counted yet
  RequestNumber next_number_ = 1;  // under mutex_
  bool stopping_ = false;          // under mutex_
  bool stop_ = false;              // engine thread: leave the loop
  std::thread thread_;
};

}  // namespace kvrelay::engine
