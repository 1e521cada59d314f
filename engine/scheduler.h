// Continuous batching: which requests run, and with which of their tokens, step by step.
//
// A request is admitted in the order of arrival, when max_batch and the pool leave room for all
// that it will ever need (prompt and whole answer), so that an admitted request never waits for
// blocks. Each step runs the next token of every decoding request and, together, up to
// prefill_chunk prompt tokens of the others. The KV of a system prompt (whole blocks) is computed
// once: requests that come meanwhile wait for it, later ones find it in the store. Prompts that
// begin alike share as many blocks in the same way, whether they name a system prompt or not. What
// kDecode requests leave in the cache is kept for the next turn of their conversation, while nobody
// needs the blocks.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/ids.h"
#include "base/thread_checker.h"
#include "engine/model_runner.h"
#include "engine/request.h"
#include "kvcache/conversation_store.h"
#include "kvcache/prefix_store.h"

namespace kvrelay::engine {

struct SchedulerOptions {
  uint32_t max_batch = 64;
  uint32_t prefill_chunk = 256;
  ContentHash model{};              // part of prefix names
  uint32_t auto_prefix_tokens = 0;  // as in EngineOptions
  std::vector<uint32_t> eos_ids{};
  std::function<TimePoint()> now{};  // monotonic; tests turn it by hand
};

// How much is going on, and what has been since the start.
struct SchedulerCounts {
  uint32_t queued = 0;
  uint32_t running = 0;  // admitted, held ones included
  uint64_t steps = 0;
  uint64_t prompt_tokens = 0;  // computed here
  uint64_t generated_tokens = 0;
  uint64_t finished_ok = 0;
  uint64_t cancelled = 0;
  uint64_t failed = 0;
  uint64_t prefixes_found = 0;     // requests with a shared prefix, or more of one, than they name
  uint64_t prefixes_promoted = 0;  // shared prefixes made of what a running request had already
};

// One thread: the engine's. `runner` and both stores outlive it.
class Scheduler {
 public:
  Scheduler(ModelRunner& runner, SystemPrefixStore& prefixes, ConversationStore& conversations,
            SchedulerOptions options);
  ~Scheduler();

  // `request` passed CheckRequest.
  void Add(RequestNumber number, Request request);
  // Lets a held request run; ignored when it ended meanwhile. A kDecode request whose prefix does
  // not match fails.
  void Begin(RequestNumber number, engine::Begin begin);
  // Ends a request with `why` (kCancelled: finish_reason cancelled, else error). Unknown numbers
  // are ignored.
  void End(RequestNumber number, const Status& why);
  void EndAll(const Status& why);

  // Ends requests whose deadline has passed, admits, and runs one step. False when there was
  // nothing to run: then something has to happen first (Add, Begin, freed blocks, or
  // NextDeadline()).
  bool Step();
  // The earliest deadline of all requests; TimePoint::max() without one.
  TimePoint NextDeadline() const;
  SchedulerCounts counts() const;

 private:
  struct PendingPrefix;
  struct Sequence;
  struct Work;

  // admit.cc
  void Admit();
  bool TryAdmit(Sequence& sequence);
  ConversationStore::Match FindKept(const Sequence& sequence);
  Admission AdmissionOf(Sequence& sequence) const;
  Result<BlockTable> Allocate(uint32_t count, uint32_t ready, uint32_t spare);
  static uint32_t TokensFromElsewhere(const Sequence& sequence);
  uint32_t PrefixBlocksToCome(const Sequence& next) const;
  std::shared_ptr<PendingPrefix> MakePending(const Sequence& sequence);
  std::shared_ptr<PendingPrefix> FindPending(std::span<const ContentHash> names) const;

  // find_prefix.cc
  uint32_t NamedTokens(const Sequence& sequence) const;
  void ChoosePrefix(Sequence& sequence, ConversationStore::Match& kept) const;
  uint32_t CommonWithOthers(const Sequence& sequence) const;
  uint32_t CompleteBlocks(const Sequence& sequence) const;
  PrefixRef PromoteFor(const Sequence& sequence);
  PrefixRef Promote(Sequence& holder, uint32_t blocks);

  void Expire();
  std::string Whereabouts(const Sequence& sequence) const;
  std::vector<Work> PlanStep();
  void PlanPrefix(Sequence& sequence, uint32_t& budget, std::vector<Work>& works);
  static std::shared_ptr<PendingPrefix> NextToRun(std::shared_ptr<PendingPrefix> prefix);
  void PlanTokens(Sequence& sequence, uint32_t& budget, std::vector<Work>& works);
  void FinishIfComplete(const std::shared_ptr<PendingPrefix>& prefix);
  void ApplyPrefix(const std::shared_ptr<PendingPrefix>& prefix, uint32_t tokens);
  void ApplyTokens(Sequence& sequence, uint32_t tokens, const ItemResult& result);
  void Finish(Sequence& sequence, FinishReason reason, Status status);
  void Keep(Sequence& sequence);
  void DropFinished();
  Sequence* Find(RequestNumber number);

  ModelRunner& runner_;
  SystemPrefixStore& prefixes_;
  ConversationStore& conversations_;
  const SchedulerOptions options_;
  std::deque<std::unique_ptr<Sequence>> queue_;    // not yet admitted, in order of arrival
  std::vector<std::unique_ptr<Sequence>> active_;  // in order of admission
  SchedulerCounts counts_;
  ThreadChecker engine_thread_;
};

}  // namespace kvrelay::engine
