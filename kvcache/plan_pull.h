// The planner: which bytes of the owner's cache go where in the reader's. All heterogeneity between
// the two sides is decided here, by pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kvcache/copy_plan.h"
#include "kvcache/layout.h"
#include "kvcache/shard.h"

namespace kvrelay {

// Positions in a request's token sequence, [begin, end).
struct TokenRange {
  uint32_t begin = 0;
  uint32_t end = 0;
  uint32_t size() const { return end - begin; }
  bool operator==(const TokenRange&) const = default;
};

// The blocks that hold a request's tokens from `first_token` on (a multiple of the block size):
// blocks[i] holds tokens [first_token + i * block_size, ... + block_size). A suffix behind a shared
// prefix starts with first_token > 0. Layers that keep only a window hold tokens from `held_from`
// on (the reader: wants them from there on); blocks before are not looked at.
struct TableView {
  std::span<const BlockId> blocks;
  uint32_t first_token = 0;
  uint32_t held_from = 0;
};

// The same with block ids of its own, as it travels.
struct KvTable {
  std::vector<BlockId> blocks;
  uint32_t first_token = 0;
  uint32_t held_from = 0;
  bool operator==(const KvTable&) const = default;
  TableView view() const { return {blocks, first_token, held_from}; }
};

// One side of a pull.
struct PullSide {
  const KvLayout& layout;
  const KvShard& shard;
  TableView table;
  // By kind of layers, where they have blocks of their own; kinds behind these use `table`.
  std::span<const TableView> tables = {};
  // Instead of the layout's, where scales belong to the request and came with its block table.
  const KvScales* scales = nullptr;
};

// Whether this owner rank can serve this reader rank at all: kIncompatible with both sides' values
// when the models, head dims, windows, or pages do not fit, kInvalidArgument when a side
// contradicts itself. For the handshake; PlanPull asks it too. Addresses are KvLayout::Validate's
// business.
Status CheckServable(const KvLayout& owner, const KvShard& owner_shard, const KvLayout& reader,
                     const KvShard& reader_shard);

// Whether the tables of `side` give blocks that exist to all of `tokens` in every kind of layers
// (where they keep a window: to what they hold of it). kInvalidArgument, which begins with `name`.
Status CheckTables(std::string_view name, const PullSide& side, TokenRange tokens);

// All of `layers` in `head_group` that both hold, global KV heads [head_begin, head_end) of that
// group, token range `tokens` (of layers that keep a window: those of it that the reader wants);
// nothing for an empty range. Between layouts, block sizes and dtypes that differ in any way.
//
// Opaque pages are cut by block and head only: the range must begin at a page, and takes the whole
// page in which it ends (what lies behind it in the reader's last page is overwritten).
//
// kIncompatible as CheckServable, and when no layer is held by both; kInvalidArgument when a side
// does not hold the heads, a table does not cover the range or a block id is out of range. Layouts
// that did not pass KvLayout::Validate give a plan that CopyPlan::Validate may refuse.
Result<CopyPlan> PlanPull(const PullSide& owner, const PullSide& reader, uint32_t head_begin,
                          uint32_t head_end, TokenRange tokens, uint32_t head_group = 0,
                          LayerRange layers = {});

}  // namespace kvrelay
