// A request on its way through the scheduler. Only scheduler.cc, plan_step.cc and admit.cc look
// inside.
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
  ContentHash hash;
  std::vector<uint32_t> tokens;  // whole blocks
  BlockTable blocks;
  uint32_t computed = 0;  // tokens whose KV is written
};

struct Scheduler::Sequence {
  RequestNumber number = 0;
  Request request;
  std::vector<uint32_t> tokens;  // prompt, then the answer so far
  uint32_t prompt_tokens = 0;
  uint32_t shared_tokens = 0;
  ConversationStore::Match kept;  // of an earlier turn, until the admission has it
  ContentHash prefix_hash;
  engine::Begin begin;  // progress callbacks
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
};

// One item of a step: tokens of a sequence, or of a pending prefix.
struct Scheduler::Work {
  Sequence* sequence = nullptr;
  std::shared_ptr<PendingPrefix> prefix;
  StepItem item;
  std::vector<const ProgressFn*> progress;  // what item.progress points to
};

}  // namespace kvrelay::engine
