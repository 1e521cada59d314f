// What one step runs, and what its results mean.
#include <algorithm>
#include <utility>

#include "engine/scheduler.h"
#include "engine/sequence.h"

namespace kvrelay::engine {

// The prefix itself, or, until that has come far enough, the one that it begins with.
std::shared_ptr<Scheduler::PendingPrefix> Scheduler::NextToRun(
    std::shared_ptr<PendingPrefix> prefix) {
  while (prefix->begins_with) {
    if (prefix->begins_with->computed < prefix->begins_with_tokens) {
      prefix = prefix->begins_with;
      continue;
    }
    prefix->computed = prefix->begins_with_tokens;
    prefix->begins_with = nullptr;
  }
  return prefix;
}

void Scheduler::PlanPrefix(Sequence& sequence, uint32_t& budget, std::vector<Work>& works) {
  const std::shared_ptr<PendingPrefix> prefix = NextToRun(sequence.pending);
  // Who waits for another's start hears of it with the first tokens of its own.
  const bool hears = prefix == sequence.pending && sequence.begin.progress;
  const ProgressFn* progress = hears ? &sequence.begin.progress : nullptr;
  const auto planned = std::find_if(works.begin(), works.end(),
                                    [&](const Work& work) { return work.prefix == prefix; });
  if (planned != works.end()) {
    if (hears) planned->progress.push_back(progress);
    return;
  }
  const auto left = static_cast<uint32_t>(prefix->tokens.size()) - prefix->computed;
  const uint32_t take = std::min(budget, left);
  if (take == 0) return;
  budget -= take;
  Work work;
  work.prefix = prefix;
  work.item.token_ids = std::span(prefix->tokens).subspan(prefix->computed, take);
  work.item.first_position = prefix->computed;
  work.item.blocks = prefix->blocks.blocks();
  if (hears) work.progress.push_back(progress);
  works.push_back(std::move(work));
}

void Scheduler::PlanTokens(Sequence& sequence, uint32_t& budget, std::vector<Work>& works) {
  const auto left = static_cast<uint32_t>(sequence.tokens.size()) - sequence.computed;
  // A single token (every decoding request's) is always taken: a long prompt must not stop the
  // others.
  const uint32_t take = left == 1 ? 1 : std::min(budget, left);
  if (take == 0) return;
  if (left > 1) budget -= take;
  Work work;
  work.sequence = &sequence;
  work.item.token_ids = std::span(sequence.tokens).subspan(sequence.computed, take);
  work.item.first_position = sequence.computed;
  work.item.prefix = sequence.prefix_blocks();
  work.item.blocks = sequence.blocks.blocks();
  const bool sampled = sequence.request.kind != RequestKind::kPrefill && take == left;
  const bool greedy = sequence.request.sampling.temperature == 0;
  work.item.want_token = sampled && greedy;
  work.item.want_logits = sampled && !greedy;
  if (sequence.begin.progress) work.progress.push_back(&sequence.begin.progress);
  works.push_back(std::move(work));
}

std::vector<Scheduler::Work> Scheduler::PlanStep() {
  std::vector<Work> works;
  uint32_t budget = options_.prefill_chunk;
  for (const auto& sequence : active_) {
    if (!sequence->begun) continue;
    if (sequence->pending) FinishIfComplete(NextToRun(sequence->pending));
    if (sequence->pending) {
      PlanPrefix(*sequence, budget, works);
    } else {
      PlanTokens(*sequence, budget, works);
    }
  }
  return works;
}

void Scheduler::ApplyPrefix(const std::shared_ptr<PendingPrefix>& prefix, uint32_t tokens) {
  prefix->computed += tokens;
  counts_.prompt_tokens += tokens;
  for (const auto& sequence : active_) {
    if (sequence->pending == prefix) sequence->outcome.computed_tokens += tokens;
  }
  FinishIfComplete(prefix);
}

void Scheduler::FinishIfComplete(const std::shared_ptr<PendingPrefix>& prefix) {
  const auto all = static_cast<uint32_t>(prefix->tokens.size());
  if (prefix->computed < all) return;
  const PrefixRef ref = prefixes_.Insert({.hash = prefix->names.back(),
                                          .tokens = all,
                                          .blocks = std::move(prefix->blocks),
                                          .scales = {},
                                          .cast = false,
                                          .names = std::move(prefix->names)});
  for (const auto& sequence : active_) {
    if (sequence->pending != prefix) continue;
    sequence->prefix = ref;
    sequence->pending = nullptr;
    sequence->computed = std::max(sequence->computed, all);
  }
}

void Scheduler::ApplyTokens(Sequence& sequence, uint32_t tokens, const ItemResult& result) {
  const bool prompt = sequence.computed < sequence.prompt_tokens;
  sequence.computed += tokens;
  if (prompt) {
    counts_.prompt_tokens += tokens;
    sequence.outcome.computed_tokens += tokens;
  }
  sequence.outcome.relay = sequence.outcome.relay || result.relay;
  if (result.relay || !sequence.outcome.relay) sequence.outcome.relay_why = result.why;
  if (prompt && sequence.computed >= sequence.prompt_tokens) {
    sequence.outcome.prompt_done = options_.now();
    if (sequence.request.kind == RequestKind::kPrefill) {
      return Finish(sequence, FinishReason::kLength, Status::Ok());
    }
  }
  if (!result.token) return;

  const auto position = static_cast<uint32_t>(sequence.tokens.size());
  const uint32_t id = result.logits.empty()
                          ? *result.token
                          : Sample(result.logits, sequence.request.sampling, position);
  sequence.tokens.push_back(id);
  ++counts_.generated_tokens;
  if (sequence.request.on_tokens) sequence.request.on_tokens(sequence.number, {&id, 1});
  const auto contains = [id](const std::vector<uint32_t>& ids) {
    return std::find(ids.begin(), ids.end(), id) != ids.end();
  };
  const Request& request = sequence.request;
  if (contains(request.stop_ids) || (!request.ignore_eos && contains(options_.eos_ids))) {
    return Finish(sequence, FinishReason::kStop, Status::Ok());
  }
  if (sequence.tokens.size() - sequence.prompt_tokens >= request.max_new_tokens) {
    Finish(sequence, FinishReason::kLength, Status::Ok());
  }
}

bool Scheduler::Step() {
  KVRELAY_DCHECK_THREAD(engine_thread_);
  Expire();
  Admit();
  std::vector<Work> works = PlanStep();
  if (works.empty()) return false;
  std::vector<StepItem> items;
  for (Work& work : works) {
    work.item.progress = work.progress;
    items.push_back(work.item);
  }
  ++counts_.steps;
  const Result<std::vector<ItemResult>> results = runner_.Step(items);
  if (!results) {
    for (const auto& sequence : active_) {
      if (sequence->begun) Finish(*sequence, FinishReason::kError, results.error());
    }
    DropFinished();
    return true;
  }
  for (size_t i = 0; i < works.size(); ++i) {
    const auto tokens = static_cast<uint32_t>(items[i].token_ids.size());
    if (works[i].prefix) {
      ApplyPrefix(works[i].prefix, tokens);
    } else {
      ApplyTokens(*works[i].sequence, tokens, (*results)[i]);
    }
  }
  DropFinished();
  return true;
}

}  // namespace kvrelay::engine
