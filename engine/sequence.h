// A request on its way through the scheduler. Only scheduler.cc, plan_step.cc, admit.cc and
// find_prefix.cc look inside.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/request.h"
#include "engine/scheduler.h"

namespace kvrelay::engine {

// A system prompt's KV that is not complete. Held by the requests that wait for it: when the last
// one ends, so does it.
struct Scheduler::PendingPrefix {
  std::vector<ContentHash> names;
  std::vector<uint32_t> tokens;  // whole blocks
  BlockTable blocks;
  uint32_t computed = 0;  // tokens whose KV is written
  // Its first blocks are those of another one, which has to write so many tokens first; else null.
  std::shared_ptr<PendingPrefix> begins_with;
  uint32_t begins_with_tokens = 0;
};

struct Scheduler::Sequence {
  RequestNumber number = 0;
  Request request;
  std::vector<uint32_t> tokens;  // prompt, then the answer so far
  uint32_t prompt_tokens = 0;
  std::vector<ContentHash> names;  // of the prompt's starts, without the last token
  uint32_t shared_tokens = 0;      // whole blocks
  ConversationStore::Match kept;   // of an earlier turn, until the admission has it
  PrefixRef found;                 // keeps its prefix in the store from the admission to Begin
  engine::Begin begin;             // progress callbacks
  bool begun = false;
  bool finished = false;  // removed at the end of the step

  // Of a shared prefix exactly one is set between admission and end: `pending` until it is
  // complete, then `prefix`.
  std::shared_ptr<PendingPrefix> pending;
  PrefixRef prefix;
  BlockTable blocks;      // behind the prefix
  uint32_t computed = 0;  // tokens whose KV is written, the prefix included; < tokens.size()
  Outcome outcome;

  std::span<const BlockId> prefix_blocks() const {
    return prefix ? prefix->blocks.blocks() : std::span<const BlockId>();
  }
  // The names of the shared prefix.
  std::span<const ContentHash> prefix_names(uint32_t block_size) const {
    return std::span(names).first(shared_tokens / block_size);
  }
};

// One item of a step: tokens of a sequence, or of a pending prefix.
struct Scheduler::Work {
  Sequence* sequence = nullptr;
  std::shared_ptr<PendingPrefix> prefix;
  StepItem item;
  std::vector<const ProgressFn*> progress;  // what item.progress points to
};

}  // namespace kvrelay::engine
