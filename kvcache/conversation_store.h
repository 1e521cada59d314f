// The KV of answered conversations that this engine keeps for their next turns: bounded, least
// recently used out first, each for a while only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/clock.h"
#include "kvcache/block_pool.h"
#include "kvcache/prefix_store.h"

namespace kvrelay {

// What is kept of one. Immutable.
struct Conversation {
  std::vector<uint32_t> tokens;  // from the first on; their KV is in the blocks
  PrefixRef prefix{};            // whole blocks, before `blocks`; null: none
  BlockTable blocks{};
  // What computing the prompts of its turns took, and how many tokens that were.
  double compute_ms = 0;
  uint64_t computed_tokens = 0;

  // Another holder of `count` blocks from the `first` on, the prefix's included.
  BlockTable Share(size_t first, size_t count) const;
};
using ConversationRef = std::shared_ptr<const Conversation>;

// Any thread. A reference keeps the blocks of a conversation that has left the store.
class ConversationStore {
 public:
  struct Limits {
    uint32_t max_blocks = 0;  // of all conversations, without their prefixes; 0: keeps nothing
    Duration ttl{};           // since it was kept or found last
  };
  struct Match {
    ConversationRef conversation;  // null: none
    uint32_t tokens = 0;           // at the start, that both have
  };
  struct Info {
    uint32_t conversations = 0;
    uint32_t blocks = 0;     // without those of prefixes; each once
    uint64_t evictions = 0;  // for others' room
    uint64_t expired = 0;
  };

  explicit ConversationStore(Limits limits);
  ~ConversationStore();

  // In place of those that it continues. One that is larger than max_blocks is not kept.
  void Keep(Conversation conversation, TimePoint now);
  // The one that has the longest start in common with `tokens`; compares the tokens themselves.
  Match Find(std::span<const uint32_t> tokens, TimePoint now);
  // Drops the least recently used one; false when there is none. For when blocks run short.
  bool EvictOne();
  // Drops those whose time is over.
  void Expire(TimePoint now);
  // When the next one's is; TimePoint::max() without any.
  TimePoint NextExpiry() const;

  Info info() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvrelay
