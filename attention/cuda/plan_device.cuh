// Reading a plan on the device.
#pragma once

#include "attention/cuda/plan.h"

namespace kvrelay::attention::cuda {

// The position-th block of a request whose first `prefix_positions` lie in a prefix.
__device__ __forceinline__ uint32_t BlockAt(const BlockTables& tables, uint32_t request,
                                            uint32_t prefix, uint32_t prefix_positions,
                                            uint32_t position) {
  return position < prefix_positions
             ? tables.prefix_blocks[uint64_t{prefix} * tables.prefix_blocks_stride + position]
             : tables
                   .blocks[uint64_t{request} * tables.blocks_stride + position - prefix_positions];
}

// The work from `unit` on, at most up to unit `end`, that belongs to one segment of `relayed`.
__device__ __forceinline__ PrefixItem ItemAt(const AttendShape& shape, const RelayedPrefix& relayed,
                                             uint32_t piece, uint32_t unit, uint32_t end) {
  const uint32_t segment = (unit - relayed.first_unit) / relayed.kv_tiles;
  const uint32_t begin_tile = (unit - relayed.first_unit) % relayed.kv_tiles;
  const uint32_t end_tile = min(relayed.kv_tiles, begin_tile + end - unit);
  const uint32_t first_request = segment % relayed.row_tiles * shape.requests_per_tile();
  return {segment / relayed.row_tiles,
          begin_tile * kTileTokens,
          min(relayed.tokens, end_tile * kTileTokens),
          relayed.first_segment + segment + piece,
          relayed.first_member + first_request,
          min(shape.requests_per_tile(), relayed.members - first_request),
          relayed.tokens,
          relayed.prefix};
}

}  // namespace kvrelay::attention::cuda
