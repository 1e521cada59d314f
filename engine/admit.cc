// Who may start: blocks and places for waiting requests.
#include <algorithm>
#include <map>
#include <span>
#include <utility>

#include "engine/scheduler.h"
#include "engine/sequence.h"

namespace kvrelay::engine {

std::shared_ptr<Scheduler::PendingPrefix> Scheduler::FindPending(const ContentHash& hash) const {
  for (const auto& sequence : active_) {
    if (sequence->pending && sequence->pending->hash == hash) return sequence->pending;
  }
  return nullptr;
}

// Blocks of the prefixes that held kDecode requests, and `next`, will pull: they take them from the
// pool themselves.
uint32_t Scheduler::PrefixBlocksToCome(const Sequence& next) const {
  std::map<ContentHash, uint32_t> tokens;
  const auto add = [&](const Sequence& sequence) {
    if (sequence.request.kind != RequestKind::kDecode || sequence.begun) return;
    if (sequence.shared_tokens > 0) tokens[sequence.prefix_hash] = sequence.shared_tokens;
  };
  add(next);
  for (const auto& sequence : active_) add(*sequence);
  if (tokens.empty()) return 0;
  for (const SystemPrefixStore::Info& info : prefixes_.List()) tokens.erase(info.hash);
  uint32_t blocks = 0;
  for (const auto& [hash, count] : tokens) blocks += count / runner_.block_size();
  return blocks;
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
    uint64_t within_reach = pool.free_blocks();
    for (const SystemPrefixStore::Info& info : prefixes_.List()) {
      if (info.references == 0) within_reach += info.tokens / runner_.block_size();
    }
    while (pool.free_blocks() < need && within_reach >= need && prefixes_.EvictOne()) {
    }
    if (pool.free_blocks() < need) return Error(Code::kOverloaded, "no free blocks");
  }
  return pool.Allocate(count, ready);
}

// An earlier turn of a request's conversation, if it has a whole block behind the shared prefix.
ConversationStore::Match Scheduler::FindKept(const Sequence& sequence) {
  if (sequence.request.kind != RequestKind::kDecode) return {};
  const auto before_last = std::span(sequence.tokens).first(sequence.prompt_tokens - 1);
  ConversationStore::Match match = conversations_.Find(before_last, options_.now());
  if (match.tokens / runner_.block_size() <= sequence.shared_tokens / runner_.block_size()) {
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

bool Scheduler::TryAdmit(Sequence& sequence) {
  const uint32_t block_size = runner_.block_size();
  bool computes_prefix =
      sequence.shared_tokens > 0 && sequence.request.kind != RequestKind::kDecode;
  std::shared_ptr<PendingPrefix> pending;
  if (computes_prefix && !sequence.prefix) {
    // Kept while the request waits: looking again would count as another hit.
    sequence.prefix = prefixes_.Find(sequence.prefix_hash);
    if (!sequence.prefix) pending = FindPending(sequence.prefix_hash);
    if (!sequence.prefix && !pending && sequence.request.reuse_tokens > 0) {
      sequence.shared_tokens = 0;
      sequence.outcome.prefix_tokens = 0;
      computes_prefix = false;
    }
  }
  ConversationStore::Match kept = FindKept(sequence);
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
    Result<BlockTable> prefix_blocks = Allocate(shared_blocks, 0, 0);
    if (!prefix_blocks) return false;
    const auto first = sequence.tokens.begin();
    pending = std::make_shared<PendingPrefix>();
    pending->hash = sequence.prefix_hash;
    pending->tokens.assign(first, first + sequence.shared_tokens);
    pending->blocks = std::move(prefix_blocks).value();
  }
  sequence.outcome.prefix_hit = sequence.prefix != nullptr;
  sequence.computed = sequence.prefix ? sequence.shared_tokens : 0;
  sequence.pending = std::move(pending);
  sequence.blocks = std::move(blocks).value();
  return true;
}

Admission Scheduler::AdmissionOf(Sequence& sequence) const {
  Admission admission;
  admission.prefix_hash = sequence.prefix_hash;
  admission.prefix_tokens = sequence.shared_tokens;
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
