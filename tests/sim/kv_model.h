// A model small enough for a hundred thousand schedules, and what its KV cache must hold: every
// 8-byte word is a function of the prompt, the position and the place, so that a stale, foreign,
// torn or unwritten word is seen.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/ids.h"
#include "kvcache/kv_view.h"
#include "kvcache/layout.h"
#include "kvcache/lease_record.h"
#include "kvcache/shard.h"
#include "transport/transport.h"

namespace kvrelay::sim {

inline constexpr uint32_t kLayers = 2;
inline constexpr uint32_t kHeads = 2;
inline constexpr uint32_t kHeadDim = 2;  // fp32: a row is one word
inline constexpr uint32_t kBlockSize = 2;
inline constexpr uint32_t kBlocks = 16;
inline constexpr uint32_t kRecordSlots = 8;
inline const ContentHash kModel{{1}};

ContentHash MakeHash(uint64_t content);

// A prompt: tokens of a shared prefix (whole blocks, maybe none) and its own behind them. Longer
// prefixes begin with the shorter ones.
struct Prompt {
  uint64_t prefix = 0;  // its number of blocks; 0: none
  uint32_t prefix_tokens = 0;
  uint64_t own = 0;
  uint32_t own_tokens = 0;
  ContentHash prefix_hash() const { return prefix == 0 ? ContentHash{} : MakeHash(prefix); }
  std::vector<ContentHash> prefix_names() const {
    std::vector<ContentHash> names;
    for (uint64_t blocks = 1; blocks <= prefix; ++blocks) names.push_back(MakeHash(blocks));
    return names;
  }
  ContentHash hash() const { return MakeHash(own * 1000003 + prefix); }
};

// The word at global position `token` of a part (prefix or own) of some prompt. All prefixes have
// the same words.
uint64_t Word(const ContentHash& part, uint32_t token, uint32_t layer, bool v, uint32_t head);

// One rank's memory: a region with the cache and one with the lease records. Kept for the whole
// schedule, as a mapped region outlives its owner.
class RankMemory {
 public:
  RankMemory(uint32_t tp_size, uint32_t tp_rank, KvFormat format);
  const KvLayout& layout() const { return layout_; }
  const KvShard& shard() const { return shard_; }
  LeaseRecord* records() { return records_.get(); }
  std::vector<transport::LocalRegion> regions();
  uint64_t* WordAt(BlockId block, uint32_t token_in_block, uint32_t layer, bool v,
                   uint32_t global_head);

 private:
  KvLayout layout_;
  KvShard shard_;
  std::vector<uint64_t> words_;
  std::unique_ptr<LeaseRecord[]> records_;
  std::unique_ptr<KvView> view_;
};

// Writes (or checks) the words of positions [first, first + count) of a part into blocks that start
// at position `table_first`.
void WritePart(RankMemory& memory, std::span<const BlockId> blocks, uint32_t table_first,
               const ContentHash& part, uint32_t first, uint32_t count);
bool CheckPart(RankMemory& memory, std::span<const BlockId> blocks, uint32_t table_first,
               const ContentHash& part, uint32_t first, uint32_t count);

}  // namespace kvrelay::sim
