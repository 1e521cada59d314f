// The KV of shared prompt heads that this engine holds: content-hashed, reference-counted, least
// recently used out first.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "kvcache/block_pool.h"
#include "kvcache/layout.h"

namespace kvrelay {

// The names of a prompt's starts, block by block: names[i] is the hash of (model fingerprint, token
// ids) of its first i + 1 blocks. How many blocks two prompts have in common at the start:
uint32_t CommonBlocks(std::span<const ContentHash> names, std::span<const ContentHash> other);

// One complete prefix. Immutable; whole blocks only.
struct SystemPrefix {
  ContentHash hash;     // of (model fingerprint, token ids)
  uint32_t tokens = 0;  // multiple of the block size
  BlockTable blocks;
  // By rank, where scales come with the request (kvcache/request_scales.h); else empty.
  std::vector<KvScales> scales;
  bool cast = false;  // its numbers were converted on their way here
  // Of its starts, the last one is `hash`; empty: nothing shorter of it is shared.
  std::vector<ContentHash> names;
};

// A reference: while one exists the prefix is not evicted. Copies count.
using PrefixRef = std::shared_ptr<const SystemPrefix>;

// Any thread.
class SystemPrefixStore {
 public:
  struct Info {
    ContentHash hash;
    uint32_t tokens = 0;
    uint32_t references = 0;  // without the store's own
    uint64_t hits = 0;
  };

  // Blocks of a prefix here that another one begins with, too.
  struct Start {
    BlockTable blocks;
    bool cast = false;
  };

  explicit SystemPrefixStore(uint32_t max_prefixes);
  ~SystemPrefixStore();

  // A reference (counts as a hit and as a use), or null.
  PrefixRef Find(const ContentHash& hash);
  // The same by the names of its starts; one that is the start of a longer one here becomes a
  // prefix of its own, with that one's blocks.
  PrefixRef Find(std::span<const ContentHash> names, uint32_t tokens);
  // The longest start that is here of a prefix with these names. Not of prefixes with scales of
  // their own: those hold for all of their blocks together. Neither a hit nor a use.
  Start FindStart(std::span<const ContentHash> names) const;
  // Takes ownership. When there are more than max_prefixes, the least recently used ones without
  // references go at once; ones with references stay and go as soon as they can (checked at each
  // Insert and Trim). If the hash is present already, the present one is returned and the blocks go
  // back to their pool.
  PrefixRef Insert(SystemPrefix prefix);
  // Evicts the least recently used prefix without references; false when there is none. For when
  // blocks run short.
  bool EvictOne();
  void Trim();
  void Clear();  // drops every prefix without references

  uint32_t size() const;
  uint32_t blocks() const;  // of all prefixes, each once
  // Different ones of the prefixes without references: what evicting all of those would free,
  // unless somebody else has them.
  uint32_t idle_blocks() const;
  uint64_t hits() const;
  uint64_t evictions() const;
  std::vector<Info> List() const;  // most recently used first

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvrelay
