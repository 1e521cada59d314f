// What the schedule kernel leaves in the workspace for the attention kernel: which work there is
// and who adds up the parts. Everything is on the device.
//
// Work comes in two kinds. Prefix work is a line of units, 128 tokens of KV for one tile of query
// rows: for each relayed prefix, each head, each row tile (together: a segment), its KV tiles in
// order. The line is cut into equal pieces, so a CTA's share of it may cover the end of one segment
// and the start of the next. Suffix work is a list of items, each some tokens of one request and
// head. A request and head that several of them contribute to has one part for each: sums that are
// not yet divided, in fp32. When a CTA finds no more work to take, its warps take requests and
// heads in turn, wait until all their parts are there, and add them up in order of position. All of
// the work that they wait for has been taken by CTAs that run, so the wait ends.
//
// "Head" here is a group of up to 16 query heads that share a KV head: several of these can share
// one (AttendShape::heads_per_kv).
#pragma once

#include <cstdint>

namespace kvrelay::attention::cuda {

inline constexpr uint32_t kTileTokens = 128;  // of KV, a unit
inline constexpr uint32_t kTileRows = 128;    // of Q, packed (request, query head)
inline constexpr uint32_t kMaxGroup = 16;     // query heads of a head, as counted here
inline constexpr uint32_t kNone = 0xffffffff;

// Sizes that launches share.
struct AttendShape {
  uint32_t heads = 0;         // groups of query heads
  uint32_t heads_per_kv = 1;  // of these groups on one KV head
  uint32_t group = 1;         // query heads of a head, at most kMaxGroup
  uint32_t block_size = 16;
  uint32_t max_requests = 0;
  uint32_t max_prefixes = 0;
  uint32_t multiprocessors = 0;
  float scale_log2 = 1.0F;  // logits in units of log 2

  __host__ __device__ uint32_t requests_per_tile() const { return kTileRows / group; }
};

// A prefix that has a pass of its own, and its place on the line of units.
struct RelayedPrefix {
  uint32_t first_unit;
  uint32_t first_segment;
  uint32_t kv_tiles;
  uint32_t row_tiles;
  uint32_t first_member;  // in `members`
  uint32_t members;
  uint32_t tokens;
  uint32_t prefix;  // the caller's index
};

// Tokens [begin, end) of a request, of which the first prefix_tokens lie in its prefix's blocks.
struct alignas(16) SuffixItem {
  uint32_t request;
  uint32_t head;
  uint32_t begin;
  uint32_t end;
  uint32_t part;           // its place among all suffix parts, in units of a head's rows
  uint32_t contributions;  // to this request and head; at most 1: the item writes the output
  uint32_t prefix_tokens;
  uint32_t prefix;
};

// The parts that a request's heads have. Head h's row tile is segment `segment + h * segment_step`
// and starts at unit `unit + h * segment_step * kv_tiles`.
struct alignas(16) RequestPlan {
  uint32_t kv_tiles;  // 0: no pass over a prefix
  uint32_t segment;
  uint32_t segment_step;
  uint32_t unit;
  uint32_t tile_row;       // its first row in the row tile
  uint32_t suffix_chunks;  // of each head
  uint32_t first_part;     // suffix parts are [first_part + chunk * heads + head]
  uint32_t unused;
};

struct PlanHeader {
  uint32_t pieces;
  uint32_t piece_units;
  uint32_t units;
  uint32_t relayed;  // count of relayed prefixes
  uint32_t suffix_items;
  uint32_t chunk_tokens;
  uint32_t merges;  // requests and heads to go through for parts to add up; 0: nobody has several
  // How often the attention kernel ran on this plan: once per layer.
  uint32_t runs;
  // Counted by the attention kernel, which leaves them zero.
  uint32_t next_piece;
  uint32_t next_suffix;
  uint32_t next_merge;
  uint32_t finished_ctas;
};

// Where things lie in the workspace. The parts' rows: prefix parts (kTileRows rows each) by segment
// + piece, then suffix parts (`group` rows each).
struct Plan {
  PlanHeader* header;
  RelayedPrefix* relayed;   // [max_prefixes]
  uint32_t* members;        // [max_requests] requests of relayed prefixes
  RequestPlan* requests;    // [max_requests]
  SuffixItem* suffix;       // [max_suffix_items]
  uint32_t* contributions;  // [max_requests][heads] parts written so far, in all runs
  float* part_rows;         // [part rows][head_dim] sum of exp2(logit - m) * v
  float2* part_sums;        // [part rows] m, the largest logit, and the sum of exp2(logit - m)
  uint32_t first_suffix_row;
};

inline uint32_t CeilDiv(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// Upper bounds that hold for any batch of the shape.
struct PlanLimits {
  uint32_t pieces;
  uint32_t segments;
  uint32_t suffix_items;

  explicit PlanLimits(const AttendShape& shape)
      : pieces(2 * shape.multiprocessors),
        segments(shape.heads *
                 (shape.max_prefixes + CeilDiv(shape.max_requests, shape.requests_per_tile()))),
        suffix_items(8 * shape.multiprocessors + 2 * shape.heads * shape.max_requests) {}
  uint32_t prefix_parts() const { return pieces + segments; }
};

}  // namespace kvrelay::attention::cuda
