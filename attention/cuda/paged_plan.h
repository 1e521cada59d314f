// What the schedule kernel of paged attention leaves in the workspace for the attention kernel.
// Everything is on the device.
//
// The query rows of a sequence, times the query heads of a KV head, are a line of packed rows
// (token-major), cut into tiles: one narrow tile where all fit into one, else wide ones. A tile
// sees a range of keys, which is cut into chunks: tile, chunk and KV head are what one CTA does at
// a time. A tile of several chunks has a part for each: sums that are not yet divided, in fp32. The
// CTA that finishes the last of them adds them up in the order of their keys.
#pragma once

#include <cstdint>

namespace kvrelay::attention::cuda {

__host__ __device__ constexpr uint32_t PiecesOf(uint32_t count, uint32_t piece) {
  return count / piece + (count % piece != 0 ? 1 : 0);
}

// How many packed rows a kernel takes at a time.
struct TileRows {
  uint32_t narrow = 0;
  uint32_t wide = 0;
};

// Sizes that launches share.
struct PagedSizes {
  uint32_t kv_heads = 1;
  uint32_t group = 1;  // query heads of a KV head
  uint32_t head_dim = 0;
  uint32_t value_dim = 0;
  uint32_t block_size = 16;
  uint32_t window = 0;
  uint32_t max_sequences = 0;
  uint32_t max_rows = 0;
  uint32_t ctas = 0;  // that run at a time
  TileRows tile;
  float scale = 1.0F;
};

struct alignas(16) PagedTile {
  uint32_t sequence;
  uint32_t first_row;   // of its sequence, in Q
  int32_t position;     // of that row: context - rows
  uint32_t packed;      // its first packed row
  uint32_t rows;        // packed
  uint32_t begin;       // keys [begin, end)
  uint32_t end;         //
  uint32_t shared;      // of the sequence's keys these lie in the prefix's blocks
  uint32_t prefix;      // whose they are
  uint32_t parts;       // of each head
  uint32_t first_part;  // row of its first part: chunk c of head h is at
                        // first_part + (h * parts + c) * rows
  uint32_t chunk;       // keys of a chunk
};

struct PagedItem {
  uint32_t tile;
  uint32_t chunk;
};

struct PagedHeader {
  uint32_t items;
  // Counted by the attention kernel, which leaves them zero.
  uint32_t next;
  uint32_t finished_ctas;
};

struct PagedPlan {
  PagedHeader* header;
  uint32_t* first_tiles;    // [max_sequences + 1]
  PagedTile* tiles;         // [max_tiles]
  PagedItem* items;         // [max_items]
  uint32_t* contributions;  // [max_tiles][kv_heads] parts written; the kernel leaves them zero
  float* part_rows;         // [max_part_rows][value_dim] sum of exp2(logit - m) * v
  float2* part_sums;        // [max_part_rows] m, the largest logit in units of log 2, and the sum
                            // of exp2(logit - m)
};

// Upper bounds that hold for any batch. A chunk is at least the work of all tiles over
// `items_aimed` (wide tiles' chunks: over `wide_aimed`), so the tiles that are cut have at most
// twice as many.
struct PagedLimits {
  static constexpr uint32_t kItemsPerCta = 3;

  uint32_t tiles;
  uint32_t items_aimed;
  uint32_t wide_aimed;
  uint32_t items;
  uint64_t part_rows;

  __host__ __device__ explicit PagedLimits(const PagedSizes& sizes)
      : tiles(sizes.max_sequences + PiecesOf(sizes.max_rows * sizes.group, sizes.tile.wide)),
        items_aimed(kItemsPerCta * sizes.ctas),
        wide_aimed(sizes.ctas),
        items(tiles + PiecesOf(2 * (items_aimed + wide_aimed), sizes.kv_heads)),
        part_rows(uint64_t{2} * (items_aimed + sizes.kv_heads) * sizes.tile.narrow +
                  uint64_t{2} * (wide_aimed + sizes.kv_heads) * sizes.tile.wide) {}
};

}  // namespace kvrelay::attention::cuda
