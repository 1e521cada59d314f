// What prompts have in common at the start becomes a shared prefix, whether they name one or not.
#include <algorithm>
#include <span>
#include <utility>

#include "engine/scheduler.h"
#include "engine/sequence.h"

namespace kvrelay::engine {

uint32_t Scheduler::NamedTokens(const Sequence& sequence) const {
  return SharedTokens(static_cast<uint32_t>(sequence.request.system_ids.size()),
                      sequence.prompt_tokens, runner_.block_size());
}

// Blocks at the start that another live prompt or a prefix in the store has, too.
uint32_t Scheduler::CommonWithOthers(const Sequence& sequence) const {
  auto most = static_cast<uint32_t>(prefixes_.FindStart(sequence.names).blocks.size());
  const auto look = [&](const auto& others) {
    for (const auto& other : others) {
      if (other.get() == &sequence) continue;
      most = std::max(most, CommonBlocks(sequence.names, other->names));
    }
  };
  look(active_);
  look(queue_);
  return most;
}

// The prefix that a request shares: its system prompt, or more than that, where others begin alike
// and no earlier turn of the conversation is longer.
void Scheduler::ChoosePrefix(Sequence& sequence, ConversationStore::Match& kept) const {
  uint32_t shared = NamedTokens(sequence);
  if (options_.auto_prefix_tokens > 0) {
    const uint32_t common = CommonWithOthers(sequence) * runner_.block_size();
    if (common >= options_.auto_prefix_tokens && common > std::max(shared, kept.tokens)) {
      shared = common;
      kept = {};
    }
  }
  sequence.shared_tokens = shared;
  sequence.outcome.prefix_tokens = shared;
}

// Blocks of the prompt whose KV is complete on all ranks.
uint32_t Scheduler::CompleteBlocks(const Sequence& sequence) const {
  const bool runs = sequence.begun && !sequence.pending;
  return runs ? sequence.computed / runner_.block_size() : 0;
}

// Where a running request has more of a request's prefix than the store, that becomes a prefix
// there. Null: it was not so.
PrefixRef Scheduler::PromoteFor(const Sequence& sequence) {
  const std::span<const ContentHash> names = sequence.prefix_names(runner_.block_size());
  if (options_.auto_prefix_tokens == 0 || names.empty()) return nullptr;
  auto most = static_cast<uint32_t>(prefixes_.FindStart(names).blocks.size());
  Sequence* holder = nullptr;
  for (const auto& other : active_) {
    const uint32_t blocks = std::min(CommonBlocks(names, other->names), CompleteBlocks(*other));
    if (blocks <= most || blocks * runner_.block_size() < options_.auto_prefix_tokens) continue;
    most = blocks;
    holder = other.get();
  }
  return holder != nullptr ? Promote(*holder, most) : nullptr;
}

// From then on the holder, too, has these blocks by its prefix.
PrefixRef Scheduler::Promote(Sequence& holder, uint32_t blocks) {
  const uint32_t before = static_cast<uint32_t>(holder.prefix_blocks().size());
  BlockTable start;
  if (holder.prefix) start = holder.prefix->blocks.Share(0, std::min(before, blocks));
  if (blocks > before) start.Append(holder.blocks.Share(0, blocks - before));
  const std::vector<BlockId> ids(start.blocks().begin(), start.blocks().end());
  PrefixRef prefix =
      prefixes_.Insert({.hash = holder.names[blocks - 1],
                        .tokens = blocks * runner_.block_size(),
                        .blocks = std::move(start),
                        .scales = {},
                        .cast = holder.begin.cast || (holder.prefix && holder.prefix->cast),
                        .names = {holder.names.begin(), holder.names.begin() + blocks}});
  // A pull may have brought it meanwhile, into blocks of its own.
  const bool promoted = std::ranges::equal(prefix->blocks.blocks(), ids);
  if (promoted) ++counts_.prefixes_promoted;
  if (!promoted || blocks <= before) return prefix;
  holder.blocks = holder.blocks.Share(blocks - before, holder.blocks.size() - (blocks - before));
  holder.prefix = prefix;
  holder.shared_tokens = prefix->tokens;
  holder.outcome.prefix_tokens = prefix->tokens;
  return prefix;
}

}  // namespace kvrelay::engine
