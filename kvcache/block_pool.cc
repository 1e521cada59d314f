#include "kvcache/block_pool.h"

#include <cassert>
#include <deque>
#include <mutex>
#include <string>
#include <utility>

namespace kvrelay {

struct BlockPool::State {
  explicit State(uint32_t num_blocks) : references(num_blocks, 0) {
    for (BlockId block = 0; block < num_blocks; ++block) free.push_back(block);
  }

  mutable std::mutex mutex;
  // Both under `mutex`: a block is in `free` exactly when its count is 0.
  std::vector<uint32_t> references;
  std::deque<BlockId> free;  // longest free first
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
  return std::shared_ptr<BlockPool>(new BlockPool(num_blocks));
}

BlockPool::BlockPool(uint32_t num_blocks) : state_(std::make_unique<State>(num_blocks)) {}

BlockPool::~BlockPool() = default;

Result<BlockTable> BlockPool::Allocate(uint32_t count) {
  if (count > num_blocks()) {
    return Error(Code::kTooLarge, "asked for " + std::to_string(count) +
                                      " KV blocks, the pool has " + std::to_string(num_blocks()));
  }
  std::vector<BlockId> blocks;
  blocks.reserve(count);
  {
    const std::lock_guard lock(state_->mutex);
    const size_t available = state_->free.size();
    if (count > available) {
      return Error(Code::kOverloaded, "asked for " + std::to_string(count) + " KV blocks, " +
                                          std::to_string(available) + " of " +
                                          std::to_string(num_blocks()) + " are free");
    }
    for (uint32_t i = 0; i < count; ++i) {
      const BlockId block = state_->free.front();
      state_->free.pop_front();
      state_->references[block] = 1;
      blocks.push_back(block);
    }
  }
  return BlockTable(shared_from_this(), std::move(blocks));
}

uint32_t BlockPool::num_blocks() const { return static_cast<uint32_t>(state_->references.size()); }

uint32_t BlockPool::free_blocks() const {
  const std::lock_guard lock(state_->mutex);
  return static_cast<uint32_t>(state_->free.size());
}

uint32_t BlockPool::used_blocks() const { return num_blocks() - free_blocks(); }

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
    if (--state_->references[block] == 0) state_->free.push_back(block);
  }
}

}  // namespace kvrelay
