// The producer warp of an attention CTA: takes work by ticket, tells the consumers, and keeps the
// ring full. Pieces of prefix first, one at a time; then suffix items, fetched ahead.
#pragma once

#include "attention/cuda/attend_args.h"
#include "attention/cuda/ptx.h"
#include "attention/cuda/shared.h"

namespace kvrelay::attention::cuda {

// Where an item's KV units of 16 tokens lie.
struct UnitSource {
  uint32_t request = 0;
  uint32_t prefix = 0;
  uint32_t prefix_tokens = 0;
  uint32_t first = 0;
  uint32_t units = 0;
};

template <uint32_t kHeadDim>
class Producer {
 public:
  using S = Shared<kHeadDim>;

  __device__ Producer(S& shared, const AttendArgs& args, const CacheMaps& maps)
      : shared_(shared),
        args_(args),
        maps_(maps),
        lane_(threadIdx.x % 32),
        keep_(ptx::PolicyEvictLast()),
        stream_(ptx::PolicyEvictFirst()) {}

  // Until there is no work left. All lanes of the warp.
  __device__ void Run() {
    PlanHeader& header = *args_.plan.header;
    uint32_t piece = Ticket(&header.next_piece);
    uint32_t current = Ticket(&header.next_suffix);
    uint32_t next = Ticket(&header.next_suffix);
    const uint32_t pieces = header.pieces;
    const uint32_t items = header.suffix_items;
    piece = Broadcast(piece);
    while (piece < pieces) {
      Piece(header, piece);
      piece = Broadcast(Ticket(&header.next_piece));
    }
    current = Broadcast(current);
    SuffixItem item;
    uint32_t ids = 0;
    if (current < items) {
      item = args_.plan.suffix[current];
      ids = Ids(Source(item), 0);
    }
    while (current < items) {
      next = Broadcast(next);
      const uint32_t after = Ticket(&header.next_suffix);
      SuffixItem following;
      if (next < items) following = args_.plan.suffix[next];
      Suffix(item, ids);
      if (next < items) {
        item = following;
        ids = Ids(Source(item), 0);
      }
      current = next;
      next = after;
    }
    Publish({.kind = WorkKind::kStop});
    Finish(header);
  }

 private:
  __device__ uint32_t Ticket(uint32_t* counter) { return lane_ == 0 ? atomicAdd(counter, 1) : 0; }
  __device__ uint32_t Broadcast(uint32_t value) { return __shfl_sync(~0U, value, 0); }

  // The last CTA that takes no more work leaves the counters as the next launch needs them.
  __device__ void Finish(PlanHeader& header) {
    if (lane_ != 0) return;
    __threadfence();
    if (atomicAdd(&header.finished_ctas, 1) != gridDim.x - 1) return;
    header.next_piece = 0;
    header.next_suffix = 0;
    header.finished_ctas = 0;
  }

  __device__ void Publish(const Work& work) {
    ptx::Wait(ptx::SharedAddress(&shared_.work_empty[work_.slot]), work_.parity ^ 1);
    if (lane_ == 0) {
      shared_.work[work_.slot] = work;
      ptx::Arrive(ptx::SharedAddress(&shared_.work_full[work_.slot]));
    }
    work_.Next();
  }

  __device__ UnitSource Source(const SuffixItem& item) const {
    return {item.request, item.prefix, item.prefix_tokens, item.begin / kUnitTokens,
            (item.end - item.begin + kUnitTokens - 1) / kUnitTokens};
  }

  // The block of unit 32 * window + lane.
  __device__ uint32_t Ids(const UnitSource& source, uint32_t window) const {
    const uint32_t unit = window * 32 + lane_;
    if (unit >= source.units) return 0;
    const uint32_t token = (source.first + unit) * kUnitTokens;
    const uint32_t block_size = args_.shape.block_size;
    if (token < source.prefix_tokens) {
      return args_
          .prefix_blocks[uint64_t{source.prefix} * args_.prefix_blocks_stride + token / block_size];
    }
    return args_.blocks[uint64_t{source.request} * args_.blocks_stride +
                        (token - source.prefix_tokens) / block_size];
  }

  // Brings a tile of K or V into the next stage; the stage also waits for `more_bytes`.
  __device__ void Tile(const CUtensorMap& map, const UnitSource& source, uint32_t tile,
                       uint32_t ids, uint32_t head, uint64_t policy, uint32_t more_bytes = 0) {
    const uint32_t units = min(kUnitsPerTile, source.units - tile * kUnitsPerTile);
    const uint32_t full = ptx::SharedAddress(&shared_.full[ring_.slot]);
    ptx::Wait(ptx::SharedAddress(&shared_.empty[ring_.slot]), ring_.parity ^ 1);
    if (lane_ == 0) ptx::ArriveExpect(full, units * S::kUnitBytes + more_bytes);
    const uint32_t to = ptx::SharedAddress(shared_.ring[ring_.slot]);
    const uint32_t block_units = args_.shape.block_size / kUnitTokens;
    const uint32_t first = source.first + tile * kUnitsPerTile;
    const uint32_t head_place = head / args_.shape.heads_per_kv * maps_.head_step;
#pragma unroll 1
    for (uint32_t u = 0; u < units; ++u) {
      const uint32_t block = __shfl_sync(~0U, ids, (tile * kUnitsPerTile + u) % 32);
      const uint32_t in_block = block_units == 1 ? 0 : (first + u) % block_units;
      if (lane_ == 0) {
        ptx::CopyBox(to + u * S::kUnitBytes, &map, in_block * (kUnitTokens / 8),
                     block * maps_.block_step + head_place, full, policy);
      }
    }
    ring_.Next();
  }

  __device__ void Suffix(const SuffixItem& item, uint32_t even) {
    Publish({.kind = WorkKind::kSuffix,
             .head = item.head,
             .tokens = item.end - item.begin,
             .part = item.part,
             .request = item.request,
             .contributions = item.contributions,
             .q_slot = q_slot_});
    const UnitSource source = Source(item);
    if (source.units == 0) return;
    const uint32_t tiles = (source.units + kUnitsPerTile - 1) / kUnitsPerTile;
    uint32_t odd = tiles > 4 ? Ids(source, 1) : 0;
    for (uint32_t tile = 0; tile < tiles; ++tile) {
      const uint32_t window = tile / 4;
      if (tile % 4 == 0 && tile > 0) (window % 2 == 0 ? odd : even) = Ids(source, window + 1);
      const uint32_t ids = window % 2 == 0 ? even : odd;
      const uint32_t full = ptx::SharedAddress(&shared_.full[ring_.slot]);
      const uint32_t group = args_.shape.group;
      Tile(maps_.k, source, tile, ids, item.head, stream_, tile == 0 ? group * kHeadDim * 2 : 0);
      if (tile == 0 && lane_ == 0) {
        const auto* q =
            static_cast<const uint8_t*>(args_.q) +
            (uint64_t{item.request} * args_.shape.heads + item.head) * group * (kHeadDim * 2);
#pragma unroll 1
        for (uint32_t row = 0; row < group; ++row) {
          ptx::CopyBytes(ptx::SharedAddress(shared_.suffix_q[q_slot_][row]),
                         q + row * (kHeadDim * 2), kHeadDim * 2, full);
        }
      }
      Tile(maps_.v, source, tile, ids, item.head, stream_);
    }
    q_slot_ = (q_slot_ + 1) % S::kQuerySlots;
  }

  // A piece of the line of prefix units: the end of a segment, whole ones, the start of one.
  __device__ void Piece(const PlanHeader& header, uint32_t piece) {
    uint32_t unit = piece * header.piece_units;
    const uint32_t end = min(header.units, unit + header.piece_units);
    while (unit < end) {
      const uint32_t index = RelayedAt(header, unit);
      const RelayedPrefix relayed = args_.plan.relayed[index];
      const uint32_t segment = (unit - relayed.first_unit) / relayed.kv_tiles;
      const uint32_t begin_tile = (unit - relayed.first_unit) % relayed.kv_tiles;
      const uint32_t end_tile = min(relayed.kv_tiles, begin_tile + end - unit);
      Segment(relayed, index, segment, begin_tile, end_tile,
              relayed.first_segment + segment + piece);
      unit += end_tile - begin_tile;
    }
  }

  // The relayed prefix that a unit belongs to.
  __device__ uint32_t RelayedAt(const PlanHeader& header, uint32_t unit) const {
    uint32_t found = 0;
    for (uint32_t first = 0; first < header.relayed; first += 32) {
      const bool before =
          first + lane_ < header.relayed && args_.plan.relayed[first + lane_].first_unit <= unit;
      found += __popc(__ballot_sync(~0U, before));
    }
    return found - 1;
  }

  __device__ void Segment(const RelayedPrefix& relayed, uint32_t index, uint32_t segment,
                          uint32_t begin_tile, uint32_t end_tile, uint32_t part) {
    const uint32_t begin = begin_tile * kTileTokens;
    const uint32_t end = min(relayed.tokens, end_tile * kTileTokens);
    const uint32_t head = segment / relayed.row_tiles;
    Publish({.kind = WorkKind::kPrefix,
             .head = head,
             .tokens = end - begin,
             .part = part,
             .relayed = index,
             .row_tile = segment % relayed.row_tiles});
    const UnitSource source = {0, relayed.prefix, relayed.tokens, begin / kUnitTokens,
                               (end - begin + kUnitTokens - 1) / kUnitTokens};
    const uint32_t tiles = end_tile - begin_tile;
    uint32_t even = Ids(source, 0);
    uint32_t odd = tiles > 4 ? Ids(source, 1) : 0;
    const auto ids = [&](uint32_t tile) { return tile / 4 % 2 == 0 ? even : odd; };
    Tile(maps_.k, source, 0, even, head, keep_);
    for (uint32_t tile = 0; tile < tiles; ++tile) {
      if (tile % 4 == 0 && tile > 0) (tile / 4 % 2 == 0 ? odd : even) = Ids(source, tile / 4 + 1);
      // In the order of use: the products of tile + 1 with K go ahead of those of tile with V.
      if (tile + 1 < tiles) Tile(maps_.k, source, tile + 1, ids(tile + 1), head, keep_);
      Tile(maps_.v, source, tile, ids(tile), head, keep_);
    }
  }

  S& shared_;
  const AttendArgs& args_;
  const CacheMaps& maps_;
  const uint32_t lane_;
  const uint64_t keep_;    // prefixes are read again by other row tiles
  const uint64_t stream_;  // a request's own tokens are not
  RingPosition<S::kStages> ring_;
  RingPosition<S::kWorkSlots> work_;
  uint32_t q_slot_ = 0;
};

}  // namespace kvrelay::attention::cuda
