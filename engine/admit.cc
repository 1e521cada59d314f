// Who may start: blocks and places for waiting requests.
#include <map>
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

// Takes `count` blocks and leaves `spare` free ones. Cached prefixes that nobody uses make room
// when the free blocks do not do, unless even they would not.
Result<BlockTable> Scheduler::Allocate(uint32_t count, uint32_t spare) {
  BlockPool& pool = *runner_.pool();
  const uint64_t need = uint64_t{count} + spare;
  if (pool.free_blocks() < need) {
    uint64_t within_reach = pool.free_blocks();
    for (const SystemPrefixStore::Info& info : prefixes_.List()) {
      if (info.references == 0) within_reach += info.tokens / runner_.block_size();
    }
    while (pool.free_blocks() < need && within_reach >= need && prefixes_.EvictOne()) {
    }
    if (pool.free_blocks() < need) return Error(Code::kOverloaded, "no free blocks");
  }
  return pool.Allocate(count);
}

bool Scheduler::TryAdmit(Sequence& sequence) {
  const bool computes_prefix =
      sequence.shared_tokens > 0 && sequence.request.kind != RequestKind::kDecode;
  std::shared_ptr<PendingPrefix> pending;
  if (computes_prefix && !sequence.prefix) {
    // Kept while the request waits: looking again would count as another hit.
    sequence.prefix = prefixes_.Find(sequence.prefix_hash);
    if (!sequence.prefix) pending = FindPending(sequence.prefix_hash);
  }
  Result<BlockTable> blocks =
      Allocate(OwnBlocks(sequence.request, runner_.block_size()), PrefixBlocksToCome(sequence));
  if (!blocks) return false;
  if (computes_prefix && !sequence.prefix && !pending) {
    Result<BlockTable> prefix_blocks = Allocate(sequence.shared_tokens / runner_.block_size(), 0);
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
    Admission admission;
    admission.prefix_hash = sequence.prefix_hash;
    admission.prefix_tokens = sequence.shared_tokens;
    admission.prefix_cached = sequence.prefix != nullptr;
    if (sequence.prefix) admission.prefix_blocks = sequence.prefix->blocks.Share();
    if (sequence.pending) admission.prefix_blocks = sequence.pending->blocks.Share();
    admission.blocks = sequence.blocks.Share();
    sequence.request.on_admitted(sequence.number, std::move(admission));
  }
}

}  // namespace kvrelay::engine
