// Which blocks a pool hands out.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "kvcache/layout.h"

namespace kvrelay {

// Calls come under its pool's lock, but for Prepare, which any thread makes for blocks that it
// holds.
class BlockSource {
 public:
  virtual ~BlockSource() = default;

  virtual uint32_t num_ids() const = 0;  // ids are below
  virtual uint32_t num_blocks() const = 0;
  virtual uint32_t free_blocks() const = 0;
  // `count` blocks for one table, always when so many are free; else kOverloaded with both numbers.
  // kTooLarge: no table holds that many.
  virtual Result<std::vector<BlockId>> Take(uint32_t count) = 0;
  // Nobody holds it any more.
  virtual void Give(BlockId block) = 0;
  // Blocks that were taken together, the first of them, can be written from now on.
  // kResourceExhausted.
  virtual Status Prepare(std::span<const BlockId> blocks) = 0;
};

}  // namespace kvrelay
