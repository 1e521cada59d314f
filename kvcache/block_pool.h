// Who owns which block. One pool per engine: all its ranks use the same block ids.
// Reference-counted, because a system prefix's blocks are in many requests' tables.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "kvcache/block_source.h"
#include "kvcache/layout.h"

namespace kvrelay {

class BlockPool;

// One holder's references to blocks, in token order. Move-only; the destructor gives them back. The
// pool outlives it.
class BlockTable {
 public:
  BlockTable() = default;
  BlockTable(BlockTable&& other) noexcept;
  BlockTable& operator=(BlockTable&& other) noexcept;
  BlockTable(const BlockTable&) = delete;
  BlockTable& operator=(const BlockTable&) = delete;
  ~BlockTable();

  std::span<const BlockId> blocks() const { return blocks_; }
  size_t size() const { return blocks_.size(); }
  bool empty() const { return blocks_.empty(); }
  // Another holder of the same blocks, or of `count` of them from `first` on.
  BlockTable Share() const { return Share(0, blocks_.size()); }
  BlockTable Share(size_t first, size_t count) const;
  // Takes over `tail`'s blocks, after ours. Same pool.
  void Append(BlockTable tail);
  void Reset();

 private:
  friend class BlockPool;
  BlockTable(std::shared_ptr<BlockPool> pool, std::vector<BlockId> blocks);
  std::shared_ptr<BlockPool> pool_;
  std::vector<BlockId> blocks_;
};

// Any thread.
class BlockPool : public std::enable_shared_from_this<BlockPool> {
 public:
  // Blocks that are all there from the start. Those that were freed longest ago are given first, so
  // that a stale reader has the longest time to notice.
  static std::shared_ptr<BlockPool> Create(uint32_t num_blocks);
  static std::shared_ptr<BlockPool> Create(std::unique_ptr<BlockSource> source);
  ~BlockPool();

  // `count` blocks with one reference each, or kOverloaded (now) / kTooLarge (never) with both
  // numbers; all or nothing. They can be written: by anybody the first `ready` of them, the others
  // by the engine in its steps (of a virtual cache: kvcache/virtual_blocks.h).
  Result<BlockTable> Allocate(uint32_t count) { return Allocate(count, count); }
  Result<BlockTable> Allocate(uint32_t count, uint32_t ready);

  uint32_t num_blocks() const;
  uint32_t free_blocks() const;
  uint32_t used_blocks() const;  // that somebody holds; what is left over in pages is neither

 private:
  friend class BlockTable;
  struct State;
  explicit BlockPool(std::unique_ptr<BlockSource> source);
  void AddRef(std::span<const BlockId> blocks);
  void Release(std::span<const BlockId> blocks);
  std::unique_ptr<State> state_;
};

}  // namespace kvrelay
