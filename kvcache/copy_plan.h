// A copy between two layouts as pure data: strided boxes x block pairs. O(layers + blocks), never
// O(slices). A plan never crosses the wire; both the host copy and a GPU kernel walk it.
//
// Bytes that box b copies: for each pair p of its range, for each i in [0, outer.count), j in [0,
// inner.count):
//   run_bytes from  src region base + src_offset + p.src * src_block_stride + i * outer.src_stride
//   + j * inner.src_stride
//             to    dst region base + dst_offset + p.dst * dst_block_stride + i * outer.dst_stride
//             + j * inner.dst_stride
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kvcache/layout.h"
#include "kvcache/shard.h"

namespace kvrelay {

struct BlockPair {
  uint32_t src = 0;
  uint32_t dst = 0;
  bool operator==(const BlockPair&) const = default;
};

struct CopyDim {
  uint32_t count = 1;
  int64_t src_stride = 0;  // bytes
  int64_t dst_stride = 0;
  bool operator==(const CopyDim&) const = default;
};

struct CopyBox {
  RegionId src_region = 0;
  RegionId dst_region = 0;
  int64_t src_offset = 0;  // bytes, of block 0; may be negative where every pair's block is > 0
  int64_t dst_offset = 0;
  CopyDim outer;
  CopyDim inner;
  uint64_t run_bytes = 0;  // contiguous on both sides; as long as the layouts allow
  uint32_t first_pair = 0;
  uint32_t num_pairs = 0;
  bool operator==(const CopyBox&) const = default;

  uint64_t bytes() const { return run_bytes * inner.count * outer.count * num_pairs; }
};

struct CopyPlan {
  uint64_t src_block_stride = 0;
  uint64_t dst_block_stride = 0;
  std::vector<CopyBox> boxes;
  std::vector<BlockPair> pairs;
  bool operator==(const CopyPlan&) const = default;

  uint64_t bytes() const;
  uint64_t slices() const;  // number of contiguous runs
  // Every byte that the plan touches lies inside its region (bytes by RegionId). Executors require
  // a plan that passed.
  Status Validate(std::span<const uint64_t> src_region_bytes,
                  std::span<const uint64_t> dst_region_bytes) const;
};

// Positions in a request's token sequence, [begin, end).
struct TokenRange {
  uint32_t begin = 0;
  uint32_t end = 0;
  uint32_t size() const { return end - begin; }
  bool operator==(const TokenRange&) const = default;
};

// The blocks that hold a request's tokens from `first_token` on (a multiple of the block size):
// blocks[i] holds tokens [first_token + i * block_size, ... + block_size). A suffix behind a shared
// prefix starts with first_token > 0.
struct TableView {
  std::span<const BlockId> blocks;
  uint32_t first_token = 0;
};

// One side of a pull.
struct PullSide {
  const KvLayout& layout;
  const KvShard& shard;
  TableView table;
};

// Which bytes of the owner's cache go where in the reader's: all layers that both hold, global KV
// heads [head_begin, head_end), token range `tokens`; nothing for an empty range. Pure.
// kIncompatible (with both sides' values) when dims differ or no layer is held by both,
// kInvalidArgument when a side does not hold the heads, a table does not cover the range or a block
// id is out of range. Layouts that did not pass KvLayout::Validate give a plan that
// CopyPlan::Validate may refuse.
Result<CopyPlan> PlanPull(const PullSide& owner, const PullSide& reader, uint32_t head_begin,
                          uint32_t head_end, TokenRange tokens);

// What one packed read asks for, in the model's coordinates. Canonical stream order: [layer][K or
// V][head][token][dim].
struct StreamShape {
  uint32_t layer_begin = 0;  // global
  uint32_t layer_end = 0;
  uint32_t head_begin = 0;  // global KV heads
  uint32_t head_end = 0;
  TokenRange tokens;
  DType dtype = DType::kFp32;
  uint32_t head_dim = 0;
  bool has_v = true;
  bool operator==(const StreamShape&) const = default;

  uint64_t row_bytes() const { return uint64_t{head_dim} * SizeOf(dtype); }
  uint64_t bytes() const;
};

// The same stream cut into chunks of at most `chunk_bytes`, each whole rows of (layer, K|V, head)
// or, when one row is longer than that, a token range of one row. Both sides derive the same chunks
// from the same numbers.
class StreamChunks {
 public:
  // kInvalidArgument when the shape is empty or absurd, or chunk_bytes is smaller than one token's
  // row.
  static Result<StreamChunks> Make(const StreamShape& shape, uint64_t chunk_bytes);

  uint32_t count() const;
  uint64_t bytes(uint32_t chunk) const;
  const StreamShape& shape() const { return shape_; }

  // Owner: cache -> chunk buffer (dst region 0). Reader: chunk buffer (src region 0) -> cache.
  // Errors as PlanPull.
  Result<CopyPlan> PlanPack(const PullSide& owner, uint32_t chunk) const;
  Result<CopyPlan> PlanUnpack(const PullSide& reader, uint32_t chunk) const;

 private:
  // Rows [first_row, first_row + rows) of the stream, the same tokens of each.
  struct Cut {
    uint64_t first_row = 0;
    uint64_t rows = 0;
    TokenRange tokens;
  };
  Cut CutOf(uint32_t chunk) const;
  Result<CopyPlan> Plan(std::string_view name, const PullSide& cache, uint32_t chunk,
                        bool pack) const;

  StreamShape shape_;
  uint64_t rows_per_chunk_ = 1;
  uint32_t tokens_per_chunk_ = 0;  // of each row
  uint32_t chunks_per_row_ = 1;    // 1 unless rows_per_chunk_ is 1
};

}  // namespace kvrelay
