// What the schedule kernel leaves in the workspace for the attention kernel: which work there is
// and who adds up the parts. Everything is on the device.
//
// Work comes in two kinds. Prefix work is a line of units, 128 tokens of KV for one tile of query
// rows: for each relayed prefix, each head, each row tile (together: a segment), its KV tiles in
// order. The line is cut into equal pieces, so a CTA's share of it may cover the end of one segment
// and the start of the next. Suffix work is some tokens of one request, once for each head.
//
// A CTA's first work is its own, and complete in one place: a piece of the line, or a suffix item.
// Further suffix items are taken by ticket. Where a CTA does not run yet because another kernel
// holds its multiprocessor, one that has nothing left to do takes its first work.
//
// A request and head that several pieces and items contribute to has one part for each: sums that
// are not yet divided, in fp32. When no work is left to take, warps wait until all parts of their
// requests and heads are there, and add them up in order of position. All of the work that they
// wait for has been taken by CTAs that run, so the wait ends.
//
// "Head" here is a group of up to 16 query heads that share a KV head: several of these can share
// one (AttendShape::heads_per_kv).
#pragma once

#include <cstdint>

namespace kvrelay::attention::cuda {

inline constexpr uint32_t kTileTokens = 128;  // of KV, a unit
inline constexpr uint32_t kTileRows = 128;    // of Q, packed (request, query head)
inline constexpr uint32_t kUnitTokens = 16;   // what one copy brings
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
struct alignas(16) RelayedPrefix {
  uint32_t first_unit;
  uint32_t first_segment;
  uint32_t kv_tiles;
  uint32_t row_tiles;
  uint32_t first_member;  // in `members`
  uint32_t members;
  uint32_t tokens;
  uint32_t prefix;  // the caller's index
};

// Tokens [begin, end) of a prefix for a tile of query rows.
struct alignas(16) PrefixItem {
  uint32_t head;
  uint32_t begin;
  uint32_t end;
  uint32_t part;          // its place among all prefix parts
  uint32_t first_member;  // of the tile's requests, in `members`
  uint32_t requests;
  uint32_t prefix_tokens;
  uint32_t prefix;
};

// Tokens [begin, end) of a request, of which the first prefix_tokens lie in its prefix's blocks.
struct alignas(16) SuffixItem {
  uint32_t head;
  uint32_t begin;
  uint32_t end;
  uint32_t part;  // its place among all suffix parts
  uint32_t request;
  uint32_t alone;  // 1: nobody else contributes, the item writes the output
  uint32_t prefix_tokens;
  uint32_t prefix;
};

enum class WorkKind : uint32_t { kStop = 0, kSuffix = 1, kPrefix = 2 };

// What a CTA begins with.
struct alignas(16) FirstWork {
  union {
    SuffixItem suffix;
    PrefixItem prefix;
  };
  uint32_t blocks[32];  // that the first units of 16 tokens lie in
  WorkKind kind;        // kStop: nothing
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

struct alignas(16) PlanHeader {
  uint32_t pieces;  // those of the first CTAs
  uint32_t piece_units;
  uint32_t units;
  uint32_t relayed;       // count of relayed prefixes
  uint32_t suffix_items;  // item i: head i % heads of chunk i / heads
  uint32_t merges;        // requests and heads to go through for parts to add up; 0: all are alone
  // Counted by the attention kernel, which leaves them zero.
  uint32_t next_suffix;  // of the items that no CTA begins with
  uint32_t next_merge;
  uint32_t finished_ctas;
};

// Where things lie in the workspace. The parts' rows: prefix parts (kTileRows rows each) by segment
// + piece, then suffix parts (`group` rows each).
struct Plan {
  PlanHeader* header;
  FirstWork* first;         // [multiprocessors]
  uint32_t* begun;          // [multiprocessors] 1: the first work has been taken; left zero
  RelayedPrefix* relayed;   // [max_prefixes]
  uint32_t* members;        // [max_requests] requests of relayed prefixes
  RequestPlan* requests;    // [max_requests]
  SuffixItem* chunks;       // [max_chunks] of head 0
  uint32_t* contributions;  // [max_requests][heads] parts written so far; left zero
  float* part_rows;         // [part rows][head_dim] sum of exp2(logit - m) * v
  float2* part_sums;        // [part rows] m, the largest logit, and the sum of exp2(logit - m)
  uint32_t first_suffix_row;
};

// Where a step's tokens are: [max_requests][blocks_stride] and
// [max_prefixes][prefix_blocks_stride].
struct BlockTables {
  const uint32_t* blocks;
  const uint32_t* prefix_blocks;
  uint32_t blocks_stride;
  uint32_t prefix_blocks_stride;
};

__host__ __device__ inline uint32_t CeilDiv(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// Upper bounds that hold for any batch of the shape.
struct PlanLimits {
  uint32_t pieces;
  uint32_t segments;
  uint32_t chunks;

  explicit PlanLimits(const AttendShape& shape)
      : pieces(shape.multiprocessors),
        segments(shape.heads *
                 (shape.max_prefixes + CeilDiv(shape.max_requests, shape.requests_per_tile()))),
        chunks(CeilDiv(8 * shape.multiprocessors, shape.heads) + 2 * shape.max_requests) {}
  uint32_t prefix_parts() const { return pieces + segments; }
};

}  // namespace kvrelay::attention::cuda
