#include "engine/engine.h"

#include <glog/logging.h>
#include <poll.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <utility>
#include <vector>

#include "engine/checkpoint.h"
#include "engine/fingerprint.h"

namespace kvrelay::engine {
namespace {

// Submissions are bounded by max_queue; what remains are a few commands per request.
constexpr size_t kMaxCommands = size_t{1} << 20;

RequestLimits LimitsFor(const ModelRunner& runner, const EngineOptions& options) {
  RequestLimits limits;
  limits.vocab_size = runner.config().vocab_size;
  limits.max_position = runner.config().max_position;
  limits.max_prompt_tokens =
      options.max_prompt_tokens > 0 ? options.max_prompt_tokens : limits.max_position;
  limits.block_size = runner.block_size();
  limits.num_blocks = runner.pool()->num_blocks();
  return limits;
}

// When something other than a command has to be looked at: a deadline, or, while requests wait for
// room, blocks that somebody else (a lease, a pull) gave back to the pool.
TimePoint WakeAt(const Scheduler& scheduler) {
  constexpr Duration kPoolPoll = std::chrono::milliseconds(1);
  const TimePoint deadline = scheduler.NextDeadline();
  if (scheduler.counts().queued == 0) return deadline;
  return std::min(deadline, TimePoint(std::chrono::steady_clock::now()) + kPoolPoll);
}

}  // namespace

Result<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options,
                                               std::shared_ptr<const Platform> platform) {
  KVRELAY_RETURN_IF_ERROR(options.Validate());
  KVRELAY_ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model_dir));
  KVRELAY_ASSIGN_OR_RETURN(Tokenizer tokenizer, Tokenizer::Load(options.model_dir, config));
  KVRELAY_ASSIGN_OR_RETURN(const Checkpoint checkpoint, options.load_format == LoadFormat::kDummy
                                                            ? Checkpoint::Dummy()
                                                            : Checkpoint::Open(options.model_dir));
  KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<ModelRunner> runner,
                           ModelRunner::Create(config, checkpoint, options, std::move(platform)));
  return std::unique_ptr<Engine>(new Engine(options, ModelFingerprint(config, checkpoint),
                                            std::move(tokenizer), std::move(runner)));
}

Engine::Engine(EngineOptions options, ContentHash fingerprint, Tokenizer tokenizer,
               std::unique_ptr<ModelRunner> runner)
    : options_(std::move(options)),
      fingerprint_(fingerprint),
      tokenizer_(std::move(tokenizer)),
      runner_(std::move(runner)),
      prefixes_(std::make_unique<SystemPrefixStore>(options_.max_cached_system_prompts)),
      conversations_(std::make_unique<ConversationStore>(ConversationStore::Limits{
          .max_blocks = options_.conversation_blocks, .ttl = options_.conversation_ttl})),
      limits_(LimitsFor(*runner_, options_)),
      commands_(kMaxCommands),
      thread_([this] { Loop(); }) {}

Engine::~Engine() { Stop({Code::kCancelled, "the engine ends"}); }

Result<RequestNumber> Engine::Submit(Request request) {
  KVRELAY_RETURN_IF_ERROR(CheckRequest(request, limits_));
  RequestNumber number = 0;
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) return Error(Code::kDraining, "the engine ends");
    const uint32_t waiting = counts_.queued + unseen_;
    const uint32_t places = options_.max_batch - std::min(options_.max_batch, counts_.running);
    if (waiting >= uint64_t{options_.max_queue} + places) {
      return Error(Code::kOverloaded, std::to_string(waiting) +
                                          " requests wait already (max_queue = " +
                                          std::to_string(options_.max_queue) + ")");
    }
    ++unseen_;
    number = next_number_++;
  }
  Post([this, number, request = std::move(request)](Scheduler& scheduler) mutable {
    scheduler.Add(number, std::move(request));
    const std::lock_guard lock(mutex_);
    --unseen_;
    counts_ = scheduler.counts();
  });
  return number;
}

void Engine::Begin(RequestNumber number, engine::Begin begin) {
  Post([number, begin = std::move(begin)](Scheduler& scheduler) mutable {
    scheduler.Begin(number, std::move(begin));
  });
}

void Engine::End(RequestNumber number, const Status& why) {
  Post([number, why](Scheduler& scheduler) { scheduler.End(number, why); });
}

void Engine::Stop(const Status& why) {
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(stopping_, true)) return;
  }
  Post([this, why](Scheduler& scheduler) {
    scheduler.EndAll(why);
    stop_ = true;
  });
  thread_.join();
}

SchedulerCounts Engine::counts() const {
  const std::lock_guard lock(mutex_);
  SchedulerCounts counts = counts_;
  counts.queued += unseen_;
  return counts;
}

void Engine::Post(Command command) {
  // Submissions are bounded by max_queue and the other commands by them: the queue is never full in
  // a correct program.
  CHECK(commands_.Push(std::move(command))) << "the engine's command queue is full";
}

void Engine::Sleep(TimePoint until) const {
  timespec timeout = {};
  const timespec* wait = nullptr;
  if (until != TimePoint::max()) {
    const auto left = std::max(Duration::zero(), until - std::chrono::steady_clock::now());
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(left);
    timeout.tv_sec = seconds.count();
    timeout.tv_nsec = (left - seconds).count();
    wait = &timeout;
  }
  pollfd fd = {.fd = commands_.fd(), .events = POLLIN, .revents = 0};
  (void)::ppoll(&fd, 1, wait, nullptr);
}

void Engine::Loop() {
  ::pthread_setname_np(::pthread_self(), "kvr-engine");
  Scheduler scheduler(*runner_, *prefixes_, *conversations_,
                      {.max_batch = options_.max_batch,
                       .prefill_chunk = options_.prefill_chunk,
                       .model = fingerprint_,
                       .auto_prefix_tokens = options_.auto_prefix_tokens,
                       .eos_ids = config().eos_ids,
                       .now = [] { return TimePoint(std::chrono::steady_clock::now()); }});
  std::vector<Command> commands;
  while (!stop_) {
    commands.clear();
    commands_.DrainInto(commands);
    for (Command& command : commands) command(scheduler);
    const bool ran = !stop_ && scheduler.Step();
    {
      const std::lock_guard lock(mutex_);
      counts_ = scheduler.counts();
    }
    if (!ran && !stop_) Sleep(WakeAt(scheduler));
  }
}

}  // namespace kvrelay::engine
