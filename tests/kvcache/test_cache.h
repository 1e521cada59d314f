// A KV cache in ordinary memory whose every byte is known from the model's coordinates: the oracle
// of the planner's tests goes by the address formula in kvcache/layout.h, one row at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvcache/layout.h"
#include "kvcache/plan_pull.h"
#include "kvcache/shard.h"
#include "tests/kvcache/seed.h"

namespace kvrelay::testing_support {

// Byte `byte` of the row of one token and head, in the model's coordinates (`layer` and `head` are
// global).
std::byte TrueByte(uint32_t layer, bool v, uint32_t head, uint32_t token, uint64_t byte);

class TestCache {
 public:
  // Every byte is `fill`.
  TestCache(KvLayout layout, KvShard shard, std::byte fill);

  const KvLayout& layout() const { return layout_; }
  const KvShard& shard() const { return shard_; }
  PullSide Side(TableView table) const { return {layout_, shard_, table}; }
  std::vector<uint64_t> RegionBytes() const;
  std::vector<std::byte*> Bases();
  std::vector<const std::byte*> ConstBases() const;

  // Writes the true rows of these layers (global), heads (global) and tokens to where the table
  // says they are.
  void Write(TableView table, uint32_t layer_begin, uint32_t layer_end, uint32_t head_begin,
             uint32_t head_end, TokenRange tokens);
  void WriteAll(TableView table, TokenRange tokens) {
    Write(table, shard_.layer_begin, shard_.layer_end(), shard_.head_begin, shard_.head_end(),
          tokens);
  }
  // Whether all regions are equal, bytes between the rows too.
  bool SameBytes(const TestCache& other) const { return regions_ == other.regions_; }

 private:
  KvLayout layout_;
  KvShard shard_;
  std::vector<std::vector<std::byte>> regions_;
};

// A layout of the shard's dims with blocks, heads, tokens, layers and K|V nested in any order,
// padding between them, and one region for all, for each layer, or for each tensor. `regions`
// receives the regions' bytes. Always valid.
struct LayoutDims {
  DType dtype = DType::kFp32;
  bool mla = false;
  uint32_t head_dim = 1;
  uint32_t block_size = 1;
  uint32_t num_blocks = 1;
};
KvLayout RandomLayout(Random& random, const LayoutDims& dims, const KvShard& shard,
                      std::vector<uint64_t>& region_bytes);

// A table of distinct random blocks that covers tokens [first_token, end) or a little more.
std::vector<BlockId> RandomTable(Random& random, const KvLayout& layout, uint32_t first_token,
                                 uint32_t end);

}  // namespace kvrelay::testing_support
