#include "kvcache/conversation_store.h"

#include <algorithm>
#include <list>
#include <mutex>
#include <unordered_set>
#include <utility>

namespace kvrelay {
namespace {

uint32_t CommonStart(std::span<const uint32_t> a, std::span<const uint32_t> b) {
  const auto ends = std::ranges::mismatch(a, b);
  return static_cast<uint32_t>(ends.in1 - a.begin());
}

}  // namespace

BlockTable Conversation::Share(size_t first, size_t count) const {
  const size_t in_prefix = prefix ? prefix->blocks.size() : 0;
  const size_t of_prefix = first < in_prefix ? std::min(count, in_prefix - first) : 0;
  BlockTable table;
  if (of_prefix > 0) table.Append(prefix->blocks.Share(first, of_prefix));
  if (of_prefix < count) {
    table.Append(blocks.Share(first + of_prefix - in_prefix, count - of_prefix));
  }
  return table;
}

struct ConversationStore::State {
  struct Entry {
    ConversationRef conversation;
    TimePoint expires;
  };
  using Entries = std::list<Entry>;

  void Drop(Entries::iterator entry, Entries& out) {
    used -= entry->conversation->blocks.size();
    out.splice(out.end(), entries, entry);
  }

  mutable std::mutex mutex;
  Limits limits;
  // Under `mutex`:
  Entries entries;    // most recently used first, so that the last one expires first
  uint64_t used = 0;  // blocks of all entries
  uint64_t evictions = 0;
  uint64_t expired = 0;
};

ConversationStore::ConversationStore(Limits limits) : state_(std::make_unique<State>()) {
  state_->limits = limits;
}

ConversationStore::~ConversationStore() = default;

void ConversationStore::Keep(Conversation conversation, TimePoint now) {
  const auto kept = std::make_shared<const Conversation>(std::move(conversation));
  State::Entries out;  // destroyed after the lock: its blocks go back to the pool outside of it
  const std::lock_guard lock(state_->mutex);
  State& state = *state_;
  if (kept->blocks.size() > state.limits.max_blocks) return;
  for (auto it = state.entries.begin(); it != state.entries.end();) {
    const auto entry = it++;
    const std::vector<uint32_t>& tokens = entry->conversation->tokens;
    if (CommonStart(tokens, kept->tokens) == tokens.size()) state.Drop(entry, out);
  }
  while (state.used + kept->blocks.size() > state.limits.max_blocks) {
    state.Drop(std::prev(state.entries.end()), out);
    ++state.evictions;
  }
  state.used += kept->blocks.size();
  state.entries.push_front({kept, now + state.limits.ttl});
}

ConversationStore::Match ConversationStore::Find(std::span<const uint32_t> tokens, TimePoint now) {
  const std::lock_guard lock(state_->mutex);
  State& state = *state_;
  Match best;
  auto found = state.entries.end();
  for (auto it = state.entries.begin(); it != state.entries.end(); ++it) {
    const uint32_t common = CommonStart(it->conversation->tokens, tokens);
    if (common <= best.tokens || it->expires <= now) continue;
    best = {it->conversation, common};
    found = it;
  }
  if (found == state.entries.end()) return best;
  found->expires = now + state.limits.ttl;
  state.entries.splice(state.entries.begin(), state.entries, found);
  return best;
}

bool ConversationStore::EvictOne() {
  State::Entries out;
  const std::lock_guard lock(state_->mutex);
  if (state_->entries.empty()) return false;
  state_->Drop(std::prev(state_->entries.end()), out);
  ++state_->evictions;
  return true;
}

void ConversationStore::Expire(TimePoint now) {
  State::Entries out;
  const std::lock_guard lock(state_->mutex);
  while (!state_->entries.empty() && state_->entries.back().expires <= now) {
    state_->Drop(std::prev(state_->entries.end()), out);
    ++state_->expired;
  }
}

TimePoint ConversationStore::NextExpiry() const {
  const std::lock_guard lock(state_->mutex);
  return state_->entries.empty() ? TimePoint::max() : state_->entries.back().expires;
}

ConversationStore::Info ConversationStore::info() const {
  const std::lock_guard lock(state_->mutex);
  std::unordered_set<BlockId> blocks;
  for (const State::Entry& entry : state_->entries) {
    const auto own = entry.conversation->blocks.blocks();
    blocks.insert(own.begin(), own.end());
  }
  return {.conversations = static_cast<uint32_t>(state_->entries.size()),
          .blocks = static_cast<uint32_t>(blocks.size()),
          .evictions = state_->evictions,
          .expired = state_->expired};
}

}  // namespace kvrelay
