#include "kvcache/block_pool.h"

#include <cassert>
#include <deque>
#include <mutex>
#include <string>
#include <utility>

namespace kvrelay {
namespace {

class FreeList final : public BlockSource {
 public:
  explicit FreeList(uint32_t num_blocks) : num_blocks_(num_blocks) {
    for (BlockId block = 0; block < num_blocks; ++block) free_.push_back(block);
  }
  uint32_t num_ids() const override { return num_blocks_; }
  uint32_t num_blocks() const override { return num_blocks_; }
  uint32_t free_blocks() const override { return static_cast<uint32_t>(free_.size()); }
  Result<std::vector<BlockId>> Take(uint32_t count) override {
    if (count > free_.size()) {
      return Error(Code::kOverloaded, "asked for " + std::to_string(count) + " KV blocks, " +
                                          std::to_string(free_.size()) + " of " +
                                          std::to_string(num_blocks_) + " are free");
    }
    std::vector<BlockId> blocks(free_.begin(), free_.begin() + count);
    free_.erase(free_.begin(), free_.begin() + count);
    return blocks;
  }
  void Give(BlockId block) override { free_.push_back(block); }
  Status Prepare(std::span<const BlockId> /*blocks*/) override { return Status::Ok(); }

 private:
  const uint32_t num_blocks_;
  std::deque<BlockId> free_;  // longest free first
};

}  // namespace

struct BlockPool::State {
  explicit State(std::unique_ptr<BlockSource> from)
      : source(std::move(from)), references(source->num_ids(), 0) {}

  const std::unique_ptr<BlockSource> source;
  mutable std::mutex mutex;
  // Both under `mutex`. A count of 0: the source has it.
  std::vector<uint32_t> references;
  uint32_t used = 0;
};

BlockTable::BlockTable(std::shared_ptr<BlockPool> pool, std::vector<BlockId> blocks)
    : pool_(std::move(pool)), blocks_(std::move(blocks)) {}

BlockTable::BlockTable(BlockTable&& other) noexcept
    : pool_(std::move(other.pool_)), blocks_(std::exchange(other.blocks_, {})) {}

BlockTable& BlockTable::operator=(BlockTable&& other) noexcept {
  if (this != &other) {
    Reset();
    pool_ = std::move(other.pool_);
    blocks_ = std::exchange(other.blocks_, {});
  }
  return *this;
}

BlockTable::~BlockTable() { Reset(); }

BlockTable BlockTable::Share(size_t first, size_t count) const {
  assert(first <= blocks_.size() && count <= blocks_.size() - first);
  const auto part = blocks().subspan(first, count);
  if (pool_ != nullptr) pool_->AddRef(part);
  return {pool_, {part.begin(), part.end()}};
}

void BlockTable::Append(BlockTable tail) {
  if (tail.pool_ == nullptr) return;
  assert(pool_ == nullptr || pool_ == tail.pool_);
  pool_ = std::move(tail.pool_);
  blocks_.insert(blocks_.end(), tail.blocks_.begin(), tail.blocks_.end());
  tail.blocks_.clear();
}

void BlockTable::Reset() {
  if (pool_ != nullptr) pool_->Release(blocks_);
  pool_.reset();
  blocks_.clear();
}

std::shared_ptr<BlockPool> BlockPool::Create(uint32_t num_blocks) {
  return Create(std::make_unique<FreeList>(num_blocks));
}

std::shared_ptr<BlockPool> BlockPool::Create(std::unique_ptr<BlockSource> source) {
  return std::shared_ptr<BlockPool>(new BlockPool(std::move(source)));
}

BlockPool::BlockPool(std::unique_ptr<BlockSource> source)
    : state_(std::make_unique<State>(std::move(source))) {}

BlockPool::~BlockPool() = default;

Result<BlockTable> BlockPool::Allocate(uint32_t count, uint32_t ready) {
  assert(ready <= count);
  if (count > num_blocks()) {
    return Error(Code::kTooLarge, "asked for " + std::to_string(count) +
                                      " KV blocks, the pool has " + std::to_string(num_blocks()));
  }
  if (count == 0) return BlockTable(shared_from_this(), {});
  std::vector<BlockId> blocks;
  {
    const std::lock_guard lock(state_->mutex);
    KVRELAY_ASSIGN_OR_RETURN(blocks, state_->source->Take(count));
    for (const BlockId block : blocks) state_->references[block] = 1;
    state_->used += count;
  }
  BlockTable table(shared_from_this(), std::move(blocks));
  KVRELAY_RETURN_IF_ERROR(state_->source->Prepare(table.blocks().first(ready)));
  return table;
}

uint32_t BlockPool::num_blocks() const { return state_->source->num_blocks(); }

uint32_t BlockPool::free_blocks() const {
  const std::lock_guard lock(state_->mutex);
  return state_->source->free_blocks();
}

uint32_t BlockPool::used_blocks() const {
  const std::lock_guard lock(state_->mutex);
  return state_->used;
}

void BlockPool::AddRef(std::span<const BlockId> blocks) {
  const std::lock_guard lock(state_->mutex);
  for (const BlockId block : blocks) {
    assert(state_->references[block] > 0);
    ++state_->references[block];
  }
}

void BlockPool::Release(std::span<const BlockId> blocks) {
  const std::lock_guard lock(state_->mutex);
  for (const BlockId block : blocks) {
    assert(state_->references[block] > 0);
    if (--state_->references[block] > 0) continue;
    --state_->used;
    state_->source->Give(block);
  }
}

}  // namespace kvrelay
