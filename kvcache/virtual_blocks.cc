#include "kvcache/virtual_blocks.h"

#include <cassert>
#include <limits>
#include <utility>

namespace kvrelay {
namespace {

constexpr uint32_t kTables = 2;  // of a request

}  // namespace

VirtualBlocks::VirtualBlocks(std::shared_ptr<VirtualKvCache> cache)
    : cache_(std::move(cache)),
      block_size_(cache_->layout().kv.block_size),
      row_blocks_(cache_->layout().row_blocks),
      rows_(cache_->layout().rows) {}

uint32_t VirtualBlocks::num_ids() const { return cache_->layout().kv.num_blocks; }

uint32_t VirtualBlocks::num_blocks() const {
  return static_cast<uint32_t>(cache_->CapacityTokens(kTables) / block_size_);
}

uint32_t VirtualBlocks::free_blocks() const {
  return static_cast<uint32_t>(cache_->FreeTokens(kTables) / block_size_);
}

Result<std::vector<BlockId>> VirtualBlocks::Take(uint32_t count) {
  if (count > row_blocks_) {
    return Error(Code::kTooLarge, "a table of " + std::to_string(count) + " KV blocks, rows have " +
                                      std::to_string(row_blocks_));
  }
  const Result<uint32_t> index = cache_->AllocNewBatchIdx(0, count * block_size_);
  if (!index) {
    return Error(index.error().code() == Code::kTooLarge ? Code::kTooLarge : Code::kOverloaded,
                 std::to_string(count) + " KV blocks: " + index.error().message());
  }
  Row& row = rows_[*index];
  row.held.assign(count, true);
  row.count = count;
  std::vector<BlockId> blocks(count);
  for (uint32_t i = 0; i < count; ++i) blocks[i] = *index * row_blocks_ + i;
  return blocks;
}

void VirtualBlocks::Give(BlockId block) {
  const uint32_t index = block / row_blocks_;
  Row& row = rows_[index];
  assert(row.held[block % row_blocks_]);
  row.held[block % row_blocks_] = false;
  if (--row.count == 0) {
    [[maybe_unused]] const Status freed = cache_->FreeBatchIdx(index);
    assert(freed.ok());
    return;
  }
  const size_t before = row.held.size();
  while (!row.held.back()) row.held.pop_back();
  if (row.held.size() < before) {
    cache_->Shrink(index, static_cast<uint32_t>(row.held.size()) * block_size_);
  }
}

Status VirtualBlocks::Prepare(std::span<const BlockId> blocks) {
  if (blocks.empty()) return Status::Ok();
  const auto tokens = static_cast<uint32_t>(blocks.size()) * block_size_;
  return cache_->Extend(blocks.front() / row_blocks_, tokens);
}

}  // namespace kvrelay
