// The producer warp of an attention CTA: takes work by ticket, tells the consumers, and keeps the
// ring full. Pieces of prefix first, one at a time; then suffix items, fetched ahead.
#pragma once

#include "attention/cuda/attend_args.h"
#include "attention/cuda/ptx.h"
#include "attention/cuda/shared.h"

namespace kvrelay::attention::cuda {

// Which KV units of 16 tokens an item wants.
struct UnitSource {
  uint32_t request = 0;
  uint32_t head = 0;
  uint32_t prefix = 0;
  uint32_t prefix_tokens = 0;
  uint32_t first = 0;
  uint32_t units = 0;
};

// A unit's coordinates in the cache maps.
struct UnitPlace {
  int32_t place = 0;
  int32_t token_group = 0;
};

template <uint32_t kHeadDim>
class Producer {
 public:
  using S = Shared<kHeadDim>;
  static constexpr uint32_t kTilesPerWindow = 32 / kUnitsPerTile;

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
    // Suffix items are taken three ahead: ticket, then item, then places in the cache, each a trip
    // to L2 or memory.
    uint32_t piece = Ticket(&header.next_piece);
    uint32_t first = Ticket(&header.next_suffix);
    uint32_t second = Ticket(&header.next_suffix);
    uint32_t third = Ticket(&header.next_suffix);
    uint32_t fourth = Ticket(&header.next_suffix);
    const uint32_t pieces = header.pieces;
    items_ = header.suffix_items;
    for (piece = Broadcast(piece); piece < pieces; piece = Broadcast(Ticket(&header.next_piece))) {
      Piece(header, piece);
    }
    uint32_t index = Broadcast(first);
    uint32_t next_index = Broadcast(second);
    uint32_t item = ItemWord(index);
    uint32_t next_item = ItemWord(next_index);
    UnitPlace places = Places(Source(item), 0);
    while (index < items_) {
      const uint32_t after_index = Broadcast(third);
      third = fourth;
      fourth = Ticket(&header.next_suffix);
      const uint32_t after_item = ItemWord(after_index);
      const UnitPlace next_places = Places(Source(next_item), 0);
      Suffix(item, places);
      index = next_index, next_index = after_index;
      item = next_item, next_item = after_item;
      places = next_places;
    }
    ptx::Wait(ptx::SharedAddress(&shared_.work_empty[work_.slot]), work_.parity ^ 1);
    if (lane_ == 0) {
      shared_.work[work_.slot].kind = WorkKind::kStop;
      ptx::Arrive(ptx::SharedAddress(&shared_.work_full[work_.slot]));
    }
  }

 private:
  __device__ uint32_t Ticket(uint32_t* counter) { return lane_ == 0 ? atomicAdd(counter, 1) : 0; }
  __device__ uint32_t Broadcast(uint32_t value) { return __shfl_sync(~0U, value, 0); }

  // A suffix item is held by the warp, word i in lane i. Past the end: no tokens.
  __device__ uint32_t ItemWord(uint32_t index) const {
    constexpr uint32_t kWords = sizeof(SuffixItem) / sizeof(uint32_t);
    if (index >= items_ || lane_ >= kWords) return 0;
    return reinterpret_cast<const uint32_t*>(&args_.plan.suffix[index])[lane_];
  }
#define KVRELAY_FIELD(item, field) \
  __shfl_sync(~0U, item, offsetof(SuffixItem, field) / sizeof(uint32_t))

  __device__ UnitSource Source(uint32_t item) const {
    const uint32_t begin = KVRELAY_FIELD(item, begin);
    const uint32_t end = KVRELAY_FIELD(item, end);
    return {KVRELAY_FIELD(item, request), KVRELAY_FIELD(item, head),
            KVRELAY_FIELD(item, prefix),  KVRELAY_FIELD(item, prefix_tokens),
            begin / kUnitTokens,          (end - begin + kUnitTokens - 1) / kUnitTokens};
  }

  // Of unit 32 * window + lane.
  __device__ UnitPlace Places(const UnitSource& source, uint32_t window) const {
    const uint32_t unit = window * 32 + lane_;
    if (unit >= source.units) return {};
    const uint32_t token = (source.first + unit) * kUnitTokens;
    const uint32_t block_size = args_.shape.block_size;
    const uint32_t position = token / block_size;
    const uint32_t block =
        token < source.prefix_tokens
            ? args_.prefix_blocks[uint64_t{source.prefix} * args_.prefix_blocks_stride + position]
            : args_.blocks[uint64_t{source.request} * args_.blocks_stride + position -
                           source.prefix_tokens / block_size];
    const uint32_t kv_head = source.head / args_.shape.heads_per_kv;
    return {static_cast<int32_t>(block * maps_.block_step + kv_head * maps_.head_step),
            static_cast<int32_t>((token - position * block_size) / 8)};
  }

  // Brings a tile of K or V into the next stage; the stage also waits for `more_bytes`.
  __device__ __forceinline__ void Tile(const CUtensorMap& map, const UnitSource& source,
                                       uint32_t tile, const UnitPlace& mine, uint64_t policy,
                                       uint32_t more_bytes = 0) {
    const uint32_t units = min(kUnitsPerTile, source.units - tile * kUnitsPerTile);
    const uint32_t full = ptx::SharedAddress(&shared_.full[ring_.slot]);
    const uint32_t to = ptx::SharedAddress(shared_.ring[ring_.slot]);
    const uint32_t first_lane = tile % kTilesPerWindow * kUnitsPerTile;
    UnitPlace unit[kUnitsPerTile];
#pragma unroll
    for (uint32_t u = 0; u < kUnitsPerTile; ++u) {
      unit[u].place = __shfl_sync(~0U, mine.place, first_lane + u);
      unit[u].token_group = __shfl_sync(~0U, mine.token_group, first_lane + u);
    }
    ptx::Wait(ptx::SharedAddress(&shared_.empty[ring_.slot]), ring_.parity ^ 1);
    if (ptx::Elect()) {
      ptx::ArriveExpect(full, units * S::kUnitBytes + more_bytes);
#pragma unroll
      for (uint32_t u = 0; u < kUnitsPerTile; ++u) {
        if (u < units) {
          ptx::CopyBox(to + u * S::kUnitBytes, &map, unit[u].token_group, unit[u].place, full,
                       policy);
        }
      }
    }
    __syncwarp();
    ring_.Next();
  }

  __device__ void Suffix(uint32_t item, UnitPlace even) {
    ptx::Wait(ptx::SharedAddress(&shared_.work_empty[work_.slot]), work_.parity ^ 1);
    Work& work = shared_.work[work_.slot];
    if (lane_ < sizeof(SuffixItem) / sizeof(uint32_t)) {
      reinterpret_cast<uint32_t*>(&work.suffix)[lane_] = item;
    }
    __syncwarp();
    if (lane_ == 0) {
      work.kind = WorkKind::kSuffix;
      work.q_slot = q_slot_;
      ptx::Arrive(ptx::SharedAddress(&shared_.work_full[work_.slot]));
    }
    work_.Next();
    const UnitSource source = Source(item);
    if (source.units == 0) return;
    const uint32_t tiles = (source.units + kUnitsPerTile - 1) / kUnitsPerTile;
    UnitPlace odd;
    if (tiles > kTilesPerWindow) odd = Places(source, 1);
    for (uint32_t tile = 0; tile < tiles; ++tile) {
      const uint32_t window = tile / kTilesPerWindow;
      if (tile % kTilesPerWindow == 0 && tile > 0) {
        (window % 2 == 0 ? odd : even) = Places(source, window + 1);
      }
      const UnitPlace place = window % 2 == 0 ? even : odd;
      const uint32_t full = ptx::SharedAddress(&shared_.full[ring_.slot]);
      const uint32_t group = args_.shape.group;
      Tile(maps_.k, source, tile, place, stream_, tile == 0 ? group * kHeadDim * 2 : 0);
      if (tile == 0 && lane_ < group) {
        const auto* q =
            static_cast<const uint8_t*>(args_.q) +
            ((uint64_t{source.request} * args_.shape.heads + source.head) * group + lane_) *
                (kHeadDim * 2);
        ptx::CopyBytes(ptx::SharedAddress(shared_.suffix_q[q_slot_][lane_]), q, kHeadDim * 2, full);
      }
      Tile(maps_.v, source, tile, place, stream_);
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
    ptx::Wait(ptx::SharedAddress(&shared_.work_empty[work_.slot]), work_.parity ^ 1);
    if (lane_ == 0) {
      Work& work = shared_.work[work_.slot];
      work.prefix = {head, end - begin, part, index, segment % relayed.row_tiles};
      work.kind = WorkKind::kPrefix;
      ptx::Arrive(ptx::SharedAddress(&shared_.work_full[work_.slot]));
    }
    work_.Next();
    const UnitSource source = {0,
                               head,
                               relayed.prefix,
                               relayed.tokens,
                               begin / kUnitTokens,
                               (end - begin + kUnitTokens - 1) / kUnitTokens};
    const uint32_t tiles = end_tile - begin_tile;
    UnitPlace even = Places(source, 0);
    UnitPlace odd;
    if (tiles > kTilesPerWindow) odd = Places(source, 1);
    const auto place = [&](uint32_t tile) { return tile / kTilesPerWindow % 2 == 0 ? even : odd; };
    Tile(maps_.k, source, 0, even, keep_);
    for (uint32_t tile = 0; tile < tiles; ++tile) {
      if (tile % kTilesPerWindow == 0 && tile > 0) {
        (tile / kTilesPerWindow % 2 == 0 ? odd : even) = Places(source, tile / kTilesPerWindow + 1);
      }
      // In the order of use: the products of tile + 1 with K go ahead of those of tile with V.
      if (tile + 1 < tiles) Tile(maps_.k, source, tile + 1, place(tile + 1), keep_);
      Tile(maps_.v, source, tile, place(tile), keep_);
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
  uint32_t items_ = 0;
#undef KVRELAY_FIELD
};

}  // namespace kvrelay::attention::cuda
