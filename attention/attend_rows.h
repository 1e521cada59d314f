// Attention of packed query rows over runs of keys: the part that paged and relay attention share.
//
// Keys are visited in chunks of kChunkKeys; each chunk is an online softmax of its own, and chunks
// are added up in order of position. Whether one thread walks a row's chunks or several threads
// take some each changes who computes, not what.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "attention/attention.h"
#include "kvcache/kv_view.h"

namespace kvrelay::attention {

inline constexpr uint32_t kChunkKeys = 256;
// Rows of Q times heads of a group that one item packs at most (one row of Q at least). K and V are
// read once for all of them; at this size arithmetic outweighs reading a hundred times, while the
// accumulators still fit a core's L2.
inline constexpr uint32_t kMaxPackedRows = 256;

// Consecutive rows of Q. Row first_row + i sees the keys at positions < first_visible + i of the
// run, of these with a window only the last: none when that is not positive, all when it is past
// the end. It stands at the last position that it could see, first_visible + i - 1.
struct RowSegment {
  uint32_t first_row = 0;
  uint32_t rows = 0;
  int64_t first_visible = 0;
};

// The tokens of `head`'s blocks, then of `tail`'s (both whole blocks but the last), `keys` in all.
struct KeyRun {
  std::span<const BlockId> head;
  std::span<const BlockId> tail;
  uint32_t keys = 0;
  uint32_t first_key = 0;  // <= keys; what is before it is behind the windows of all rows
};

// Rows that meet one run of keys, in every KV head. `out` and `lse` have the shape of Q and its
// heads; an item writes its own rows there and nothing else.
struct RowItem {
  std::vector<RowSegment> segments;
  KeyRun run;
  float* out = nullptr;
  float* lse = nullptr;
};

// Cuts `rows` into items of at most kMaxPackedRows packed rows, each with only the keys that its
// rows see, and appends them. `group` is query heads per KV head, `window` as in AttentionKind.
void AppendItems(const RowItem& rows, uint32_t group, uint32_t window, std::vector<RowItem>& items);

// Computes all items, made with the batch's window, on ParallelFor.
void AttendRows(const KvView& kv, uint32_t layer, const Batch& batch,
                std::span<const RowItem> items, const float* q);

}  // namespace kvrelay::attention
