// Who may start: blocks and places for waiting requests.
#include <algorithm>
#include <map>
#include <span>
#include <utility>

#include "engine/scheduler.h"
#include "engine/sequence.h"

namespace kvrelay::engine {

// The one that has most in common with a prefix of these names; null when none has anything.
std::shared_ptr<Scheduler::PendingPrefix> Scheduler::FindPending(
    std::span<const ContentHash> names) const {
  std::shared_ptr<PendingPrefix> best;
  uint32_t most = 0;
  for (const auto& sequence : active_) {
    if (!sequence->pending) continue;
    const uint32_t common = CommonBlocks(names, sequence->pending->names);
    if (common < most || common == 0) continue;
    // Of those that begin alike the very same, if it is there.
    if (common == most && sequence->pending->names.size() != names.size()) continue;
    most = common;
    best = sequence->pending;
  }
  return best;
}

// Blocks of the prefixes that held kDecode requests, and `next`, will pull: they take them from the
// pool themselves.
uint32_t Scheduler::PrefixBlocksToCome(const Sequence& next) const {
  std::map<ContentHash, uint32_t> blocks;
  const auto add = [&](const Sequence& sequence, size_t here) {
    if (sequence.request.kind != RequestKind::kDecode || sequence.begun) return;
    const auto names = sequence.prefix_names(runner_.block_size());
    if (!names.empty()) blocks[names.back()] = static_cast<uint32_t>(names.size() - here);
  };
  for (const auto& sequence : active_) add(*sequence, 0);
  add(next, prefixes_.FindStart(next.prefix_names(runner_.block_size())).blocks.size());
  if (blocks.empty()) return 0;
  for (const SystemPrefixStore::Info& info : prefixes_.List()) blocks.erase(info.hash);
  uint32_t to_come = 0;
  for (const auto& [hash, count] : blocks) to_come += count;
  return to_come;
}

// Takes `count` blocks, of which something else than steps writes the first `ready`, and leaves
// `spare` free ones. When the free blocks do not do, kept conversations make room, and then cached
// prefixes that nobody uses, unless even they would not.
Result<BlockTable> Scheduler::Allocate(uint32_t count, uint32_t ready, uint32_t spare) {
  BlockPool& pool = *runner_.pool();
  const uint64_t need = uint64_t{count} + spare;
  while (pool.free_blocks() < need && conversations_.EvictOne()) {
  }
  if (pool.free_blocks() < need) {
    const uint64_t within_reach = uint64_t{pool.free_blocks()} + prefixes_.idle_blocks();
    while (pool.free_blocks() < need && within_reach >= need && prefixes_.EvictOne()) {
    }
    if (pool.free_blocks() < need) return Error(Code::kOverloaded, "no free blocks");
  }
  return pool.Allocate(count, ready);
}

// An earlier turn of a request's conversation, if it has a whole block behind the system prompt.
ConversationStore::Match Scheduler::FindKept(const Sequence& sequence) {
  if (sequence.request.kind != RequestKind::kDecode) return {};
  const auto before_last = std::span(sequence.tokens).first(sequence.prompt_tokens - 1);
  ConversationStore::Match match = conversations_.Find(before_last, options_.now());
  if (match.tokens / runner_.block_size() <= NamedTokens(sequence) / runner_.block_size()) {
    return {};
  }
  return match;
}

// Tokens at the start whose KV is pulled.
uint32_t Scheduler::TokensFromElsewhere(const Sequence& sequence) {
  switch (sequence.request.kind) {
    case RequestKind::kGenerate:
      return 0;
    case RequestKind::kPrefill:
      return sequence.request.reuse_tokens;
    case RequestKind::kDecode:
      return sequence.prompt_tokens;
  }
  return 0;
}

// Of the same blocks as what begins like it, as far as that is here or on its way. Null: no room.
std::shared_ptr<Scheduler::PendingPrefix> Scheduler::MakePending(const Sequence& sequence) {
  const uint32_t block_size = runner_.block_size();
  const auto names = sequence.prefix_names(block_size);
  const auto first = sequence.tokens.begin();
  auto pending = std::make_shared<PendingPrefix>();
  pending->names.assign(names.begin(), names.end());
  pending->tokens.assign(first, first + sequence.shared_tokens);
  pending->blocks = prefixes_.FindStart(names).blocks;
  pending->computed = static_cast<uint32_t>(pending->blocks.size()) * block_size;
  if (const auto other = FindPending(names)) {
    const uint32_t common = CommonBlocks(names, other->names);
    if (common > pending->blocks.size()) {
      pending->blocks = other->blocks.Share(0, common);
      pending->computed = 0;
      pending->begins_with = other;
      pending->begins_with_tokens = common * block_size;
    }
  }
  const auto here = static_cast<uint32_t>(pending->blocks.size());
  Result<BlockTable> rest = Allocate(static_cast<uint32_t>(names.size()) - here, 0, 0);
  if (!rest) return nullptr;
  pending->blocks.Append(std::move(rest).value());
  return pending;
}

bool Scheduler::TryAdmit(Sequence& sequence) {
  const uint32_t block_size = runner_.block_size();
  const bool decode = sequence.request.kind == RequestKind::kDecode;
  ConversationStore::Match kept = FindKept(sequence);
  // A prefix is kept while the request waits: looking again would count as another hit.
  if (!sequence.prefix) ChoosePrefix(sequence, kept);
  PrefixRef found = PromoteFor(sequence);
  bool computes_prefix = sequence.shared_tokens > 0 && !decode;
  std::shared_ptr<PendingPrefix> pending;
  if (computes_prefix && !sequence.prefix) {
    const auto names = sequence.prefix_names(block_size);
    sequence.prefix = prefixes_.Find(names, sequence.shared_tokens);
    if (!sequence.prefix) pending = FindPending(names);
    if (pending && pending->names.back() != names.back()) pending = nullptr;
    if (!sequence.prefix && !pending && sequence.request.reuse_tokens > 0) {
      sequence.shared_tokens = 0;
      sequence.outcome.prefix_tokens = 0;
      computes_prefix = false;
    }
  }
  const uint32_t shared_blocks = sequence.shared_tokens / block_size;
  const uint32_t kept_blocks = kept.conversation ? kept.tokens / block_size - shared_blocks : 0;
  const uint32_t held = shared_blocks + kept_blocks;
  const uint32_t arriving = (TokensFromElsewhere(sequence) + block_size - 1) / block_size;
  Result<BlockTable> blocks =
      Allocate(OwnBlocks(sequence.request, sequence.shared_tokens, block_size) - kept_blocks,
               std::max(arriving, held) - held, PrefixBlocksToCome(sequence));
  if (!blocks) return false;
  if (kept_blocks > 0) {
    BlockTable own = kept.conversation->Share(shared_blocks, kept_blocks);
    own.Append(std::move(blocks).value());
    blocks = std::move(own);
  }
  sequence.kept = std::move(kept);
  if (computes_prefix && !sequence.prefix && !pending) {
    pending = MakePending(sequence);
    if (!pending) return false;
  }
  if (decode) sequence.found = std::move(found);
  if (sequence.shared_tokens > NamedTokens(sequence)) ++counts_.prefixes_found;
  sequence.outcome.prefix_hit = sequence.prefix != nullptr;
  sequence.computed = sequence.prefix ? sequence.shared_tokens : 0;
  sequence.pending = std::move(pending);
  sequence.blocks = std::move(blocks).value();
  return true;
}

Admission Scheduler::AdmissionOf(Sequence& sequence) const {
  Admission admission;
  const auto names = sequence.prefix_names(runner_.block_size());
  admission.prefix_tokens = sequence.shared_tokens;
  admission.prefix_names.assign(names.begin(), names.end());
  admission.prefix_cached = sequence.prefix != nullptr;
  if (sequence.prefix) admission.prefix_blocks = sequence.prefix->blocks.Share();
  if (sequence.pending) admission.prefix_blocks = sequence.pending->blocks.Share();
  admission.blocks = sequence.blocks.Share();
  const uint32_t block_size = runner_.block_size();
  admission.held_tokens =
      std::max(sequence.shared_tokens, sequence.kept.tokens / block_size * block_size);
  admission.kept = std::move(sequence.kept);
  return admission;
}

void Scheduler::Admit() {
  while (!queue_.empty() && active_.size() < options_.max_batch) {
    Sequence& sequence = *queue_.front();
    if (!TryAdmit(sequence)) return;
    sequence.outcome.admitted = options_.now();
    active_.push_back(std::move(queue_.front()));
    queue_.pop_front();
    if (sequence.request.kind == RequestKind::kGenerate) {
      sequence.begun = true;
      sequence.outcome.begun = sequence.outcome.admitted;
      continue;
    }
    sequence.request.on_admitted(sequence.number, AdmissionOf(sequence));
  }
}

}  // namespace kvrelay::engine
