// Where the rows of a virtual KV cache lie: address space for max_batch_size sequences of
// max_seq_len tokens each, a sequence's tokens one behind the other, memory page by page.
//
// It is an ordinary KvLayout: row r is the blocks r * row_blocks, r * row_blocks + 1, ... Planner,
// leases and block tables see blocks, and a row's happen to be neighbours.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "kvcache/layout.h"

namespace kvrelay {

// What vAttention's init_kvcache is told.
struct VirtualKvShape {
  uint32_t num_layers = 0;
  uint32_t num_kv_heads = 0;  // of this rank
  uint32_t head_size = 0;
  uint32_t max_batch_size = 0;  // rows
  uint32_t max_seq_len = 0;
  DType dtype = DType::kFp32;
  uint64_t page_size = uint64_t{64} << 10;  // bytes, a power of two
  uint32_t block_size = 16;                 // tokens; what tables and plans count in
  // The layers inside a token: [row][token][layer][K, V][head][dim], so that a row grows by one
  // page at a time. Else K and V of each layer have a range of their own, [row][token][head][dim],
  // or of each layer and head, [row][token][dim] (kHnd; no megacache).
  bool megacache = false;
  KvFormat format = KvFormat::kNhd;
};

struct VirtualLayout {
  KvLayout kv;  // in one region of bytes()
  uint64_t page_bytes = 0;
  uint32_t rows = 0;
  uint32_t row_blocks = 0;
  uint32_t max_seq_len = 0;
  uint32_t ranges = 0;     // 1, or K and V of each layer, or of each layer and head
  uint64_t row_bytes = 0;  // of one range; whole pages

  // The ranks of one engine: equal rows, blocks and lengths, so that all of them use the same block
  // ids. Rows are as long as makes them whole pages on each. kInvalidArgument names what is wrong.
  static Result<std::vector<VirtualLayout>> Make(std::span<const VirtualKvShape> ranks);

  uint64_t bytes() const { return row_bytes * rows * ranges; }
  uint64_t row_pages() const { return row_bytes / page_bytes; }  // of one range
  // Pages that a row's first `tokens` touch in each range.
  uint64_t PagesFor(uint32_t tokens) const {
    return (tokens * kv.token_stride + page_bytes - 1) / page_bytes;
  }
  uint64_t FirstPage(uint32_t range, uint32_t row) const {
    return (uint64_t{range} * rows + row) * row_pages();
  }
  // A row may begin or end inside a page's worth of blocks: it is rounded up.
  bool rounds_up() const { return kv.block_stride % page_bytes != 0; }
};

}  // namespace kvrelay
