// A virtual KV cache as blocks: a table is the start of a row.
#pragma once

#include <memory>
#include <vector>

#include "kvcache/block_source.h"
#include "kvcache/virtual_kv_cache.h"

namespace kvrelay {

// A table's blocks are promised to its row when they are taken, and get pages by Prepare and by the
// cache's steps. The row is free again when nobody holds any of its blocks, and shorter when nobody
// holds its last ones.
//
// A request has two tables, its shared prefix and what follows, and each may waste most of a page:
// so much is left out of num_blocks() and free_blocks(), and two tables of that many blocks
// together can always be taken one after the other.
class VirtualBlocks final : public BlockSource {
 public:
  // Pages are reserved.
  explicit VirtualBlocks(std::shared_ptr<VirtualKvCache> cache);

  uint32_t num_ids() const override;
  uint32_t num_blocks() const override;
  uint32_t free_blocks() const override;
  Result<std::vector<BlockId>> Take(uint32_t count) override;
  void Give(BlockId block) override;
  Status Prepare(std::span<const BlockId> blocks) override;

 private:
  struct Row {
    std::vector<bool> held;  // by block
    uint32_t count = 0;      // of them
  };

  const std::shared_ptr<VirtualKvCache> cache_;
  const uint32_t block_size_;
  const uint32_t row_blocks_;
  std::vector<Row> rows_;
};

}  // namespace kvrelay
