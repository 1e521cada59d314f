#include "kvcache/prefix_store.h"

#include <algorithm>
#include <list>
#include <mutex>
#include <numeric>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace kvrelay {

// Equal names say that all before is equal, too.
uint32_t CommonBlocks(std::span<const ContentHash> names, std::span<const ContentHash> other) {
  const auto most = static_cast<uint32_t>(std::min(names.size(), other.size()));
  uint32_t common = 0;
  uint32_t end = most;
  while (common < end) {
    const uint32_t blocks = std::midpoint(common, end + 1);
    if (names[blocks - 1] == other[blocks - 1]) {
      common = blocks;
    } else {
      end = blocks - 1;
    }
  }
  return common;
}

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

  // Counts as a hit and as a use; null when it is not there.
  PrefixRef Use(const ContentHash& hash) {
    const auto found = by_hash.find(hash);
    if (found == by_hash.end()) return nullptr;
    entries.splice(entries.begin(), entries, found->second);
    ++hits;
    ++found->second->hits;
    return found->second->prefix;
  }

  Start LongestStart(std::span<const ContentHash> names) const {
    const SystemPrefix* best = nullptr;
    uint32_t most = 0;
    for (const Entry& entry : entries) {
      const SystemPrefix& prefix = *entry.prefix;
      const uint32_t common = CommonBlocks(prefix.names, names);
      if (common <= most || !std::ranges::all_of(prefix.scales, &KvScales::empty)) continue;
      best = &prefix;
      most = common;
    }
    if (best == nullptr) return {};
    return {best->blocks.Share(0, most), best->cast};
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
  return state_->Use(hash);
}

PrefixRef SystemPrefixStore::Find(std::span<const ContentHash> names, uint32_t tokens) {
  if (names.empty()) return nullptr;
  Start start;
  {
    const std::lock_guard lock(state_->mutex);
    if (PrefixRef prefix = state_->Use(names.back())) return prefix;
    start = state_->LongestStart(names);
  }
  if (start.blocks.size() < names.size()) return nullptr;
  // While it is held nobody evicts it.
  const PrefixRef held = Insert({.hash = names.back(),
                                 .tokens = tokens,
                                 .blocks = std::move(start.blocks),
                                 .scales = {},
                                 .cast = start.cast,
                                 .names = {names.begin(), names.end()}});
  return Find(names.back());
}

SystemPrefixStore::Start SystemPrefixStore::FindStart(std::span<const ContentHash> names) const {
  const std::lock_guard lock(state_->mutex);
  return state_->LongestStart(names);
}

PrefixRef SystemPrefixStore::Insert(SystemPrefix prefix) {
  // Destroyed after the lock: their blocks go back to the pool outside of it.
  State::Entries evicted;
  const auto inserted = std::make_shared<const SystemPrefix>(std::move(prefix));
  const std::lock_guard lock(state_->mutex);
  const auto found = state_->by_hash.find(inserted->hash);
  if (found != state_->by_hash.end()) {
    state_->entries.splice(state_->entries.begin(), state_->entries, found->second);
    return found->second->prefix;
  }
  state_->entries.push_front({inserted, 0});
  state_->by_hash.emplace(inserted->hash, state_->entries.begin());
  state_->Evict(state_->max_prefixes, evicted);
  return inserted;
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

uint32_t SystemPrefixStore::blocks() const {
  const std::lock_guard lock(state_->mutex);
  std::unordered_set<BlockId> all;
  for (const State::Entry& entry : state_->entries) {
    const auto blocks = entry.prefix->blocks.blocks();
    all.insert(blocks.begin(), blocks.end());
  }
  return static_cast<uint32_t>(all.size());
}

uint32_t SystemPrefixStore::idle_blocks() const {
  const std::lock_guard lock(state_->mutex);
  std::unordered_set<BlockId> idle;
  for (const State::Entry& entry : state_->entries) {
    const auto blocks = entry.prefix->blocks.blocks();
    if (State::Evictable(entry)) idle.insert(blocks.begin(), blocks.end());
  }
  for (const State::Entry& entry : state_->entries) {
    if (State::Evictable(entry)) continue;
    for (const BlockId block : entry.prefix->blocks.blocks()) idle.erase(block);
  }
  return static_cast<uint32_t>(idle.size());
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
