#include "kvcache/prefix_store.h"

#include <algorithm>
#include <list>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace kvrelay {

struct SystemPrefixStore::State {
  struct Entry {
    PrefixRef prefix;
    uint64_t hits = 0;
  };
  using Entries = std::list<Entry>;

  // Only the store holds it. Stays so while `mutex` is held: references come from Find and Insert,
  // or from other references.
  static bool Evictable(const Entry& entry) { return entry.prefix.use_count() == 1; }

  // Moves the least recently used evictable ones to `out` until `keep` are left; returns how many.
  size_t Evict(size_t keep, Entries& out) {
    const size_t before = out.size();
    for (auto it = entries.end(); it != entries.begin() && entries.size() > keep;) {
      const auto candidate = std::prev(it);
      if (!Evictable(*candidate)) {
        it = candidate;
        continue;
      }
      by_hash.erase(candidate->prefix->hash);
      out.splice(out.end(), entries, candidate);
    }
    const size_t evicted = out.size() - before;
    evictions += evicted;
    return evicted;
  }

  mutable std::mutex mutex;
  size_t max_prefixes = 0;
  // Under `mutex`: the same prefixes in both.
  Entries entries;  // most recently used first
  std::unordered_map<ContentHash, Entries::iterator> by_hash;
  uint64_t hits = 0;
  uint64_t evictions = 0;
};

SystemPrefixStore::SystemPrefixStore(uint32_t max_prefixes) : state_(std::make_unique<State>()) {
  state_->max_prefixes = max_prefixes;
}

SystemPrefixStore::~SystemPrefixStore() = default;

PrefixRef SystemPrefixStore::Find(const ContentHash& hash) {
  const std::lock_guard lock(state_->mutex);
  const auto found = state_->by_hash.find(hash);
  if (found == state_->by_hash.end()) return nullptr;
  state_->entries.splice(state_->entries.begin(), state_->entries, found->second);
  ++state_->hits;
  ++found->second->hits;
  return found->second->prefix;
}

PrefixRef SystemPrefixStore::Insert(const ContentHash& hash, uint32_t tokens, BlockTable blocks,
                                    std::vector<KvScales> scales, bool cast) {
  State::Entries
      evicted;  // destroyed after the lock: their blocks go back to the pool outside of it
  const std::lock_guard lock(state_->mutex);
  const auto found = state_->by_hash.find(hash);
  if (found != state_->by_hash.end()) {
    state_->entries.splice(state_->entries.begin(), state_->entries, found->second);
    return found->second->prefix;
  }
  PrefixRef prefix = std::make_shared<const SystemPrefix>(
      SystemPrefix{hash, tokens, std::move(blocks), std::move(scales), cast});
  state_->entries.push_front({prefix, 0});
  state_->by_hash.emplace(hash, state_->entries.begin());
  state_->Evict(state_->max_prefixes, evicted);
  return prefix;
}

bool SystemPrefixStore::EvictOne() {
  State::Entries evicted;
  const std::lock_guard lock(state_->mutex);
  const size_t size = state_->entries.size();
  return size > 0 && state_->Evict(size - 1, evicted) == 1;
}

void SystemPrefixStore::Trim() {
  State::Entries evicted;
  const std::lock_guard lock(state_->mutex);
  state_->Evict(state_->max_prefixes, evicted);
}

void SystemPrefixStore::Clear() {
  State::Entries evicted;
  const std::lock_guard lock(state_->mutex);
  state_->Evict(0, evicted);
}

uint32_t SystemPrefixStore::size() const {
  const std::lock_guard lock(state_->mutex);
  return static_cast<uint32_t>(state_->entries.size());
}

uint64_t SystemPrefixStore::hits() const {
  const std::lock_guard lock(state_->mutex);
  return state_->hits;
}

uint64_t SystemPrefixStore::evictions() const {
  const std::lock_guard lock(state_->mutex);
  return state_->evictions;
}

std::vector<SystemPrefixStore::Info> SystemPrefixStore::List() const {
  const std::lock_guard lock(state_->mutex);
  std::vector<Info> list;
  list.reserve(state_->entries.size());
  for (const State::Entry& entry : state_->entries) {
    list.push_back({entry.prefix->hash, entry.prefix->tokens,
                    static_cast<uint32_t>(entry.prefix.use_count() - 1), entry.hits});
  }
  return list;
}

}  // namespace kvrelay
