#include "engine/scheduler.h"

#include <algorithm>
#include <string>
#include <utility>

#include "engine/fingerprint.h"
#include "engine/sequence.h"

namespace kvrelay::engine {

Scheduler::Scheduler(ModelRunner& runner, SystemPrefixStore& prefixes,
                     ConversationStore& conversations, SchedulerOptions options)
    : runner_(runner),
      prefixes_(prefixes),
      conversations_(conversations),
      options_(std::move(options)) {}

Scheduler::~Scheduler() = default;

void Scheduler::Add(RequestNumber number, Request request) {
  KVRELAY_DCHECK_THREAD(engine_thread_);
  auto sequence = std::make_unique<Sequence>();
  sequence->number = number;
  sequence->request = std::move(request);
  const Request& r = sequence->request;
  sequence->tokens.reserve(r.prompt_tokens() + size_t{r.max_new_tokens});
  sequence->tokens.assign(r.system_ids.begin(), r.system_ids.end());
  sequence->tokens.insert(sequence->tokens.end(), r.token_ids.begin(), r.token_ids.end());
  sequence->prompt_tokens = r.prompt_tokens();
  sequence->names = PrefixNames(
      options_.model, std::span<const uint32_t>(sequence->tokens).first(r.prompt_tokens() - 1),
      runner_.block_size());
  sequence->shared_tokens = NamedTokens(*sequence);
  sequence->outcome.prompt_tokens = sequence->prompt_tokens;
  sequence->outcome.prefix_tokens = sequence->shared_tokens;
  sequence->outcome.submitted = options_.now();
  queue_.push_back(std::move(sequence));
}

Scheduler::Sequence* Scheduler::Find(RequestNumber number) {
  for (const auto& sequence : active_) {
    if (sequence->number == number) return sequence.get();
  }
  for (const auto& sequence : queue_) {
    if (sequence->number == number) return sequence.get();
  }
  return nullptr;
}

void Scheduler::Begin(RequestNumber number, engine::Begin begin) {
  KVRELAY_DCHECK_THREAD(engine_thread_);
  Sequence* sequence = Find(number);
  if (sequence == nullptr || sequence->begun || sequence->blocks.empty()) return;
  sequence->begun = true;
  sequence->outcome.begun = options_.now();
  if (sequence->request.kind == RequestKind::kDecode) {
    const uint32_t have = begin.prefix ? begin.prefix->tokens : 0;
    const auto names = sequence->prefix_names(runner_.block_size());
    sequence->found = nullptr;
    if (have != sequence->shared_tokens || (have > 0 && begin.prefix->hash != names.back())) {
      Finish(*sequence, FinishReason::kError,
             {Code::kInternal, "the prefix given has " + std::to_string(have) +
                                   " tokens or another hash; the request shares " +
                                   std::to_string(sequence->shared_tokens)});
      return DropFinished();
    }
    sequence->prefix = std::exchange(begin.prefix, nullptr);
    sequence->begin = std::move(begin);
    sequence->computed = sequence->prompt_tokens - 1;
    return;
  }
  sequence->begin = std::move(begin);
  sequence->computed = std::max(sequence->computed, sequence->begin.reused_tokens);
  const uint32_t done = sequence->pending ? sequence->pending->computed : sequence->computed;
  if (done == 0 || !sequence->begin.progress) return;
  for (uint32_t rank = 0; rank < runner_.ranks().size(); ++rank) {
    sequence->begin.progress(rank, {done, done, 0});
  }
}

void Scheduler::Finish(Sequence& sequence, FinishReason reason, Status status) {
  if (sequence.finished) return;
  sequence.finished = true;
  if (reason == FinishReason::kCancelled) {
    ++counts_.cancelled;
  } else if (reason == FinishReason::kError) {
    ++counts_.failed;
  } else {
    ++counts_.finished_ok;
  }
  if (sequence.begin.keep && status.ok()) Keep(sequence);
  // The blocks first: who hears that a request is over can rely on its room.
  sequence.blocks.Reset();
  sequence.pending = nullptr;
  sequence.prefix = nullptr;
  sequence.found = nullptr;
  sequence.outcome.reason = reason;
  sequence.outcome.status = std::move(status);
  sequence.outcome.finished = options_.now();
  if (sequence.request.on_done) sequence.request.on_done(sequence.number, sequence.outcome);
}

// The last token of the answer was never run.
void Scheduler::Keep(Sequence& sequence) {
  const uint32_t block_size = runner_.block_size();
  const uint32_t own = sequence.computed - sequence.shared_tokens;
  const auto first = sequence.tokens.begin();
  conversations_.Keep({.tokens = {first, first + sequence.computed},
                       .prefix = sequence.prefix,
                       .blocks = sequence.blocks.Share(0, (own + block_size - 1) / block_size),
                       .compute_ms = sequence.begin.compute_ms,
                       .computed_tokens = sequence.begin.computed_tokens},
                      options_.now());
}

void Scheduler::DropFinished() {
  const auto finished = [](const auto& sequence) { return sequence->finished; };
  std::erase_if(active_, finished);
  std::erase_if(queue_, finished);
}

void Scheduler::End(RequestNumber number, const Status& why) {
  KVRELAY_DCHECK_THREAD(engine_thread_);
  Sequence* sequence = Find(number);
  if (sequence == nullptr) return;
  const bool cancelled = why.code() == Code::kCancelled;
  Finish(*sequence, cancelled ? FinishReason::kCancelled : FinishReason::kError, why);
  DropFinished();
}

void Scheduler::EndAll(const Status& why) {
  const FinishReason reason =
      why.code() == Code::kCancelled ? FinishReason::kCancelled : FinishReason::kError;
  for (const auto& sequence : active_) Finish(*sequence, reason, why);
  for (const auto& sequence : queue_) Finish(*sequence, reason, why);
  DropFinished();
}

// Where a request is, for the message of one that ran out of time there.
std::string Scheduler::Whereabouts(const Sequence& sequence) const {
  if (sequence.begun) {
    const size_t generated = sequence.tokens.size() - sequence.prompt_tokens;
    return "with " + std::to_string(generated) + " tokens generated";
  }
  if (!sequence.blocks.empty()) return "waiting for its KV";
  return "in the queue (" + std::to_string(runner_.pool()->free_blocks()) + " of " +
         std::to_string(runner_.pool()->num_blocks()) + " blocks are free, " +
         std::to_string(active_.size()) + " of " + std::to_string(options_.max_batch) +
         " places are taken)";
}

void Scheduler::Expire() {
  const TimePoint now = options_.now();
  conversations_.Expire(now);
  const auto expire = [&](Sequence& sequence) {
    if (sequence.request.deadline > now) return;
    const auto ms = static_cast<int64_t>(ToMillis(now - sequence.outcome.submitted));
    Finish(sequence, FinishReason::kError,
           {Code::kDeadlineExceeded, "the request ran out of time after " + std::to_string(ms) +
                                         " ms " + Whereabouts(sequence)});
  };
  for (const auto& sequence : queue_) expire(*sequence);
  for (const auto& sequence : active_) expire(*sequence);
  DropFinished();
}

TimePoint Scheduler::NextDeadline() const {
  TimePoint next = conversations_.NextExpiry();
  for (const auto& sequence : queue_) next = std::min(next, sequence->request.deadline);
  for (const auto& sequence : active_) next = std::min(next, sequence->request.deadline);
  return next;
}

SchedulerCounts Scheduler::counts() const {
  SchedulerCounts counts = counts_;
  counts.queued = static_cast<uint32_t>(queue_.size());
  counts.running = static_cast<uint32_t>(active_.size());
  return counts;
}

}  // namespace kvrelay::engine
