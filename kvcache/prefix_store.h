// The KV of shared prompt heads that this engine holds: content-hashed, reference-counted, least
// recently used out first.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "kvcache/block_pool.h"
#include "kvcache/layout.h"

namespace kvrelay {

// One complete prefix. Immutable; whole blocks only.
struct SystemPrefix {
  ContentHash hash;     // of (model fingerprint, token ids)
  uint32_t tokens = 0;  // multiple of the block size
  BlockTable blocks;
  // By rank, where scales come with the request (kvcache/request_scales.h); else empty.
  std::vector<KvScales> scales;
  bool cast = false;  // its numbers were converted on their way here
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

  explicit SystemPrefixStore(uint32_t max_prefixes);
  ~SystemPrefixStore();

  // A reference (counts as a hit and as a use), or null.
  PrefixRef Find(const ContentHash& hash);
  // Takes ownership. When there are more than max_prefixes, the least recently used ones without
  // references go at once; ones with references stay and go as soon as they can (checked at each
  // Insert and Trim). If the hash is present already, the present one is returned and `blocks` go
  // back to their pool.
  PrefixRef Insert(const ContentHash& hash, uint32_t tokens, BlockTable blocks,
                   std::vector<KvScales> scales = {}, bool cast = false);
  // Evicts the least recently used prefix without references; false when there is none. For when
  // blocks run short.
  bool EvictOne();
  void Trim();
  void Clear();  // drops every prefix without references

  uint32_t size() const;
  uint64_t hits() const;
  uint64_t evictions() const;
  std::vector<Info> List() const;  // most recently used first

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvrelay
