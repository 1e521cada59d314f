// The three producer warps of an attention CTA. One takes work by ticket and tells all others; one
// brings K (and the queries of suffix items) into the ring, one V. A single warp would take about
// 3 us to fetch an item and to issue the copies of 64 KiB in pages of 16 tokens, longer than the
// memory needs.
#pragma once

#include <cstddef>

#include "attention/cuda/attend_args.h"
#include "attention/cuda/ptx.h"
#include "attention/cuda/shared.h"

namespace kvrelay::attention::cuda {

// Which KV units of 16 tokens an item wants.
struct UnitSource {
  uint32_t request = 0;
  uint32_t head = 0;
  uint32_t prefix = 0;
  uint32_t prefix_units = 0;
  uint32_t first = 0;
  uint32_t units = 0;
};

// What the producers share.
template <uint32_t kHeadDim>
class Producer {
 public:
  using S = Shared<kHeadDim>;

  __device__ Producer(S& shared, const AttendArgs& args, const CacheMaps& maps)
      : shared_(shared), args_(args), maps_(maps), lane_(threadIdx.x % 32) {}

 protected:
  __device__ UnitSource Source(uint32_t request, uint32_t head, uint32_t prefix,
                               uint32_t prefix_tokens, uint32_t begin, uint32_t end) const {
    return {request,
            head,
            prefix,
            prefix_tokens / kUnitTokens,
            begin / kUnitTokens,
            (end - begin + kUnitTokens - 1) / kUnitTokens};
  }

  __device__ __forceinline__ uint32_t BlockOf(uint32_t unit) const {
    return maps_.block_units == 1 ? unit : __umulhi(unit, maps_.block_units_inverse);
  }

  // Place of unit 32 * window + lane.
  __device__ int32_t Places(const UnitSource& source, uint32_t window) const {
    const uint32_t index = window * 32 + lane_;
    if (index >= source.units) return 0;
    const uint32_t unit = source.first + index;
    const uint32_t position = BlockOf(unit);
    const uint32_t block =
        unit < source.prefix_units
            ? args_.prefix_blocks[uint64_t{source.prefix} * args_.prefix_blocks_stride + position]
            : args_.blocks[uint64_t{source.request} * args_.blocks_stride + position -
                           BlockOf(source.prefix_units)];
    const uint32_t heads_per_kv = args_.shape.heads_per_kv;
    const uint32_t kv_head = heads_per_kv == 1 ? source.head : source.head / heads_per_kv;
    return static_cast<int32_t>(block * maps_.block_step + kv_head * maps_.head_step +
                                (unit - position * maps_.block_units) * maps_.unit_step);
  }

  S& shared_;
  const AttendArgs& args_;
  const CacheMaps& maps_;
  const uint32_t lane_;
  RingPosition<S::kWorkSlots> work_;
};

// Takes work: pieces of prefix first, one at a time; then suffix items, fetched ahead.
template <uint32_t kHeadDim>
class WorkProducer : public Producer<kHeadDim> {
 public:
  using Base = Producer<kHeadDim>;
  using S = Shared<kHeadDim>;
  using Base::Base;

  // Until there is no work left. All lanes of the warp.
  __device__ void Run() {
    PlanHeader& header = *args_.plan.header;
    uint32_t piece = Ticket(&header.next_piece);
    uint32_t ticket = Ticket(&header.next_suffix);
    uint32_t next_ticket = Ticket(&header.next_suffix);
    const uint32_t pieces = header.pieces;
    items_ = header.suffix_items;
    for (piece = Broadcast(piece); piece < pieces; piece = Broadcast(Ticket(&header.next_piece))) {
      Piece(header, piece);
    }
    // Ticket, item and places in the cache are each a trip to L2 or memory: those of three items
    // are under way at a time.
    uint32_t index = Broadcast(ticket);
    uint32_t item = ItemWord(index);
    uint32_t next_index = Broadcast(next_ticket);
    uint32_t next_item = ItemWord(next_index);
    ticket = Ticket(&header.next_suffix);
    int32_t places = Base::Places(SourceOf(item), 0);
    while (index < items_) {
      const int32_t next_places = Base::Places(SourceOf(next_item), 0);
      const uint32_t after_index = Broadcast(ticket);
      const uint32_t after_item = ItemWord(after_index);
      ticket = Ticket(&header.next_suffix);
      Publish(WorkKind::kSuffix, places, [&](Work& work) {
        if (lane_ < kItemWords) reinterpret_cast<uint32_t*>(&work.suffix)[lane_] = item;
        if (lane_ == 0) work.q_slot = q_slot_;
      });
      if (SourceOf(item).units > 0) q_slot_ = (q_slot_ + 1) % S::kQuerySlots;
      index = next_index, next_index = after_index;
      item = next_item, next_item = after_item;
      places = next_places;
    }
    Publish(WorkKind::kStop, 0, [](Work&) {});
  }

 private:
  using Base::args_;
  using Base::lane_;
  using Base::shared_;
  using Base::work_;

  __device__ uint32_t Ticket(uint32_t* counter) { return lane_ == 0 ? atomicAdd(counter, 1) : 0; }
  __device__ uint32_t Broadcast(uint32_t value) { return __shfl_sync(~0U, value, 0); }

  // A suffix item is held by the warp, word i in lane i. Past the end: no tokens.
  static constexpr uint32_t kItemWords = sizeof(SuffixItem) / sizeof(uint32_t);
  __device__ uint32_t ItemWord(uint32_t index) const {
    if (index >= items_ || lane_ >= kItemWords) return 0;
    return reinterpret_cast<const uint32_t*>(&args_.plan.suffix[index])[lane_];
  }
  __device__ UnitSource SourceOf(uint32_t item) const {
    const auto field = [&](size_t offset) {
      return __shfl_sync(~0U, item, static_cast<int>(offset / sizeof(uint32_t)));
    };
    return Base::Source(field(offsetof(SuffixItem, request)), field(offsetof(SuffixItem, head)),
                        field(offsetof(SuffixItem, prefix)),
                        field(offsetof(SuffixItem, prefix_tokens)),
                        field(offsetof(SuffixItem, begin)), field(offsetof(SuffixItem, end)));
  }

  // `fill(work)` writes the slot, each lane its share; `places`: of the first 32 units.
  template <typename Fill>
  __device__ __forceinline__ void Publish(WorkKind kind, int32_t places, Fill fill) {
    ptx::Wait(ptx::SharedAddress(&shared_.work_empty[work_.slot]), work_.parity ^ 1);
    Work& work = shared_.work[work_.slot];
    fill(work);
    work.places[lane_] = places;
    if (lane_ == 0) work.kind = kind;
    __syncwarp();
    if (lane_ == 0) ptx::Arrive(ptx::SharedAddress(&shared_.work_full[work_.slot]));
    work_.Next();
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
      const uint32_t begin = begin_tile * kTileTokens;
      const uint32_t end_token = min(relayed.tokens, end_tile * kTileTokens);
      const uint32_t head = segment / relayed.row_tiles;
      const UnitSource source =
          Base::Source(0, head, relayed.prefix, relayed.tokens, begin, end_token);
      Publish(WorkKind::kPrefix, Base::Places(source, 0), [&](Work& work) {
        if (lane_ != 0) return;
        work.prefix = {head,
                       begin,
                       end_token - begin,
                       relayed.first_segment + segment + piece,
                       index,
                       segment % relayed.row_tiles};
      });
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

  uint32_t items_ = 0;
  uint32_t q_slot_ = 0;
};

// Brings K, or V, of the work that it is told of.
template <uint32_t kHeadDim, bool kKeys>
class TileProducer : public Producer<kHeadDim> {
 public:
  using Base = Producer<kHeadDim>;
  using S = Shared<kHeadDim>;
  using Base::Base;
  static constexpr uint32_t kTilesPerWindow = 32 / kUnitsPerTile;

  __device__ void Run() {
    while (true) {
      ptx::Wait(ptx::SharedAddress(&shared_.work_full[work_.slot]), work_.parity);
      const Work& work = shared_.work[work_.slot];
      const WorkKind kind = work.kind;
      if (kind == WorkKind::kStop) return;
      const bool prefix = kind == WorkKind::kPrefix;
      UnitSource source;
      if (prefix) {
        const PrefixItem& item = work.prefix;
        const RelayedPrefix& relayed = args_.plan.relayed[item.relayed];
        source = Base::Source(0, item.head, relayed.prefix, relayed.tokens, item.begin,
                              item.begin + item.tokens);
      } else {
        const SuffixItem& item = work.suffix;
        source = Base::Source(item.request, item.head, item.prefix, item.prefix_tokens, item.begin,
                              item.end);
      }
      const int32_t places = work.places[lane_];
      const uint32_t q_slot = work.q_slot;
      __syncwarp();
      if (lane_ == 0) ptx::Arrive(ptx::SharedAddress(&shared_.work_empty[work_.slot]));
      work_.Next();
      // A prefix is read again by other row tiles; a request's own tokens are not.
      const uint64_t policy = prefix ? ptx::PolicyEvictLast() : ptx::PolicyEvictFirst();
      Tiles(source, prefix, places, q_slot, policy);
    }
  }

 private:
  using Base::args_;
  using Base::lane_;
  using Base::maps_;
  using Base::shared_;
  using Base::work_;

  // All tiles in order, each into its stage. Stages are in the order of use: K and V of a tile in
  // turn, but in a prefix item K of tile + 1 before V of tile, as the products with it go ahead.
  __device__ __forceinline__ void Tiles(const UnitSource& source, bool prefix, int32_t even,
                                        uint32_t q_slot, uint64_t policy) {
    const uint32_t tiles = (source.units + kUnitsPerTile - 1) / kUnitsPerTile;
    int32_t odd = tiles > kTilesPerWindow ? Base::Places(source, 1) : 0;
    if (!kKeys && prefix) ring_.Next();
#pragma unroll 1
    for (uint32_t tile = 0; tile < tiles; ++tile) {
      const uint32_t window = tile / kTilesPerWindow;
      if (tile % kTilesPerWindow == 0 && tile > 0) {
        (window % 2 == 0 ? odd : even) = Base::Places(source, window + 1);
      }
      if (!kKeys && (!prefix || tile + 1 < tiles)) ring_.Next();
      Tile(source, tile, window % 2 == 0 ? even : odd, !prefix && tile == 0, q_slot, policy);
      if (kKeys && (!prefix || tile > 0)) ring_.Next();
    }
    if (kKeys && prefix) ring_.Next();
  }

  // `query`: K's stage brings the queries too.
  __device__ __forceinline__ void Tile(const UnitSource& source, uint32_t tile, int32_t places,
                                       bool query, uint32_t q_slot, uint64_t policy) {
    const uint32_t units = min(kUnitsPerTile, source.units - tile * kUnitsPerTile);
    const uint32_t full = ptx::SharedAddress(&shared_.full[ring_.slot]);
    const uint32_t to = ptx::SharedAddress(shared_.ring[ring_.slot]);
    const uint32_t first_lane = tile % kTilesPerWindow * kUnitsPerTile;
    int32_t place[kUnitsPerTile];
#pragma unroll
    for (uint32_t u = 0; u < kUnitsPerTile; ++u) {
      place[u] = __shfl_sync(~0U, places, first_lane + u);
    }
    const uint32_t group = kKeys && query ? args_.shape.group : 0;
    ptx::Wait(ptx::SharedAddress(&shared_.empty[ring_.slot]), ring_.parity ^ 1);
    if (ptx::Elect()) {
      ptx::ArriveExpect(full, units * S::kUnitBytes + group * kHeadDim * 2);
#pragma unroll
      for (uint32_t u = 0; u < kUnitsPerTile; ++u) {
        if (u < units) {
          ptx::CopyBox(to + u * S::kUnitBytes, kKeys ? &maps_.k : &maps_.v, place[u], full, policy);
        }
      }
      if constexpr (kKeys) {
        const auto* q = static_cast<const uint8_t*>(args_.q) +
                        (uint64_t{source.request} * args_.shape.heads + source.head) *
                            args_.shape.group * (kHeadDim * 2);
#pragma unroll 1
        for (uint32_t row = 0; row < group; ++row) {
          ptx::CopyBytes(ptx::SharedAddress(shared_.suffix_q[q_slot][row]),
                         q + row * (kHeadDim * 2), kHeadDim * 2, full);
        }
      }
    }
    __syncwarp();
    ring_.Next();
  }

  RingPosition<S::kStages> ring_;
};

}  // namespace kvrelay::attention::cuda
