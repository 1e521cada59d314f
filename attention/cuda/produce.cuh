// The three producer warps of an attention CTA. One takes work by ticket and tells all others; one
// brings K (and the queries of suffix items) into the ring, one V. A single warp would take about
// 3 us to fetch an item and to issue the copies of 64 KiB in pages of 16 tokens, longer than the
// memory needs.
#pragma once

#include <cstddef>

#include "attention/cuda/attend_args.h"
#include "attention/cuda/plan_device.cuh"
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
  __device__ static UnitSource Source(uint32_t request, uint32_t head, uint32_t prefix,
                                      uint32_t prefix_tokens, uint32_t begin, uint32_t end) {
    return {request,
            head,
            prefix,
            prefix_tokens / kUnitTokens,
            begin / kUnitTokens,
            (end - begin + kUnitTokens - 1) / kUnitTokens};
  }

  __device__ __forceinline__ uint32_t PositionOf(uint32_t unit) const {
    return maps_.block_units == 1 ? unit : __umulhi(unit, maps_.block_units_inverse);
  }

  // Place of a unit of this head, which lies in this block.
  __device__ int32_t Place(uint32_t head, uint32_t unit, uint32_t block) const {
    const uint32_t heads_per_kv = args_.shape.heads_per_kv;
    const uint32_t kv_head = heads_per_kv == 1 ? head : head / heads_per_kv;
    return static_cast<int32_t>(block * maps_.block_step + kv_head * maps_.head_step +
                                (unit - PositionOf(unit) * maps_.block_units) * maps_.unit_step);
  }

  // Place of unit 32 * window + lane.
  __device__ int32_t Places(const UnitSource& source, uint32_t window) const {
    const uint32_t index = window * 32 + lane_;
    if (index >= source.units) return 0;
    const uint32_t unit = source.first + index;
    return Place(source.head, unit,
                 BlockAt(args_.tables, source.request, source.prefix,
                         PositionOf(source.prefix_units), PositionOf(unit)));
  }

  S& shared_;
  const AttendArgs& args_;
  const CacheMaps& maps_;
  const uint32_t lane_;
  RingPosition<S::kWorkSlots> work_;
};

// Takes work: what the CTA begins with, then suffix items by ticket, fetched ahead, then what CTAs
// that do not run yet would begin with.
template <uint32_t kHeadDim>
class WorkProducer : public Producer<kHeadDim> {
 public:
  using Base = Producer<kHeadDim>;
  using S = Shared<kHeadDim>;
  using Base::Base;

  // One trip to memory for all that the first work takes, which may begin before barriers are
  // ready.
  __device__ void Fetch() {
    begun_ = Take(blockIdx.x);
    first_ = LoadFirst(blockIdx.x);
    ticket_ = Ticket();
    next_ticket_ = Ticket();
    header_ = *args_.plan.header;
  }

  // Until there is no work left. All lanes of the warp.
  __device__ void Run() {
    const PlanHeader header = header_;
    if (Broadcast(begun_) == 0) Begin(header, blockIdx.x, first_);

    // Ticket, item and places in the cache are each a trip to L2 or memory: those of three items
    // are under way at a time.
    items_ = header.suffix_items;
    first_ticket_ = gridDim.x - header.pieces;
    uint32_t index = Index(ticket_);
    uint32_t item = ItemWord(index);
    uint32_t next_index = Index(next_ticket_);
    uint32_t next_item = ItemWord(next_index);
    uint32_t ticket = Ticket();
    int32_t places = Base::Places(SourceOf(item), 0);
    while (index < items_) {
      const int32_t next_places = Base::Places(SourceOf(next_item), 0);
      const uint32_t after_index = Index(ticket);
      const uint32_t after_item = ItemWord(after_index);
      ticket = Ticket();
      PublishItem(WorkKind::kSuffix, item, places);
      index = next_index, next_index = after_index;
      item = next_item, next_item = after_item;
      places = next_places;
    }

    for (uint32_t other = Unbegun(); other != kNone; other = Unbegun()) {
      // A CTA that is only late has begun by the time that this one has nothing left to do.
      WaitIdle();
      other = Unbegun();
      if (other == kNone) break;
      if (Broadcast(Take(other)) == 0) Begin(header, other, LoadFirst(other));
    }
    Publish(WorkKind::kStop, 0, [](Work&) {});
    Leave();
  }

 private:
  using Base::args_;
  using Base::lane_;
  using Base::shared_;
  using Base::work_;

  // An item is held by the warp, word i in lane i. The two kinds have the words for SourceOf in the
  // same places; request means nothing in a prefix item.
  static constexpr uint32_t kItemWords = sizeof(SuffixItem) / sizeof(uint32_t);
  static_assert(sizeof(PrefixItem) == sizeof(SuffixItem) &&
                offsetof(PrefixItem, head) == offsetof(SuffixItem, head) &&
                offsetof(PrefixItem, begin) == offsetof(SuffixItem, begin) &&
                offsetof(PrefixItem, end) == offsetof(SuffixItem, end) &&
                offsetof(PrefixItem, prefix_tokens) == offsetof(SuffixItem, prefix_tokens) &&
                offsetof(PrefixItem, prefix) == offsetof(SuffixItem, prefix));

  struct FirstWords {
    uint32_t item;
    uint32_t block;  // of unit `lane`
    WorkKind kind;
  };

  __device__ uint32_t Broadcast(uint32_t value) const { return __shfl_sync(~0U, value, 0); }
  __device__ uint32_t Take(uint32_t cta) const {
    return lane_ == 0 ? atomicExch(&args_.plan.begun[cta], 1) : 0;
  }
  __device__ FirstWords LoadFirst(uint32_t cta) const {
    const FirstWork& first = args_.plan.first[cta];
    return {lane_ < kItemWords ? reinterpret_cast<const uint32_t*>(&first.suffix)[lane_] : 0,
            first.blocks[lane_], first.kind};
  }

  __device__ uint32_t Ticket() {
    return lane_ == 0 ? atomicAdd(&args_.plan.header->next_suffix, 1) : 0;
  }
  __device__ uint32_t Index(uint32_t ticket) const { return first_ticket_ + Broadcast(ticket); }
  // Past the end: no tokens.
  __device__ uint32_t ItemWord(uint32_t index) const {
    if (index >= items_ || lane_ >= kItemWords) return 0;
    const uint32_t chunk = index / args_.shape.heads;
    uint32_t word = reinterpret_cast<const uint32_t*>(&args_.plan.chunks[chunk])[lane_];
    const uint32_t head = index - chunk * args_.shape.heads;
    if (lane_ == offsetof(SuffixItem, head) / 4 || lane_ == offsetof(SuffixItem, part) / 4) {
      word += head;
    }
    return word;
  }
  __device__ uint32_t Word(uint32_t item, size_t offset) const {
    return __shfl_sync(~0U, item, static_cast<int>(offset / sizeof(uint32_t)));
  }
  __device__ UnitSource SourceOf(uint32_t item) const {
    return Base::Source(
        Word(item, offsetof(SuffixItem, request)), Word(item, offsetof(SuffixItem, head)),
        Word(item, offsetof(SuffixItem, prefix)), Word(item, offsetof(SuffixItem, prefix_tokens)),
        Word(item, offsetof(SuffixItem, begin)), Word(item, offsetof(SuffixItem, end)));
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
    last_ = work_;
    work_.Next();
  }
  __device__ __forceinline__ void PublishItem(WorkKind kind, uint32_t item, int32_t places) {
    Publish(kind, places, [&](Work& work) {
      if (lane_ < kItemWords) reinterpret_cast<uint32_t*>(&work.suffix)[lane_] = item;
      if (lane_ == 0) work.q_slot = q_slot_;
    });
    if (kind == WorkKind::kSuffix && SourceOf(item).units > 0) {
      q_slot_ = (q_slot_ + 1) % S::kQuerySlots;
    }
  }
  // Until all that was published is done.
  __device__ void WaitIdle() const {
    ptx::Wait(ptx::SharedAddress(&shared_.work_empty[last_.slot]), last_.parity);
  }

  // What `cta` begins with: a piece of the line, or an item.
  __device__ void Begin(const PlanHeader& header, uint32_t cta, const FirstWords& first) {
    if (first.kind == WorkKind::kStop) return;
    const UnitSource source = SourceOf(first.item);
    const int32_t places = Base::Place(source.head, source.first + lane_, first.block);
    PublishItem(first.kind, first.item, places);
    if (first.kind == WorkKind::kPrefix) {
      Piece(header, cta, (source.units * kUnitTokens + kTileTokens - 1) / kTileTokens);
    }
  }

  // The rest of a piece of the line of prefix units, after its first `done` units: the end of a
  // segment, whole ones, the start of one.
  __device__ void Piece(const PlanHeader& header, uint32_t piece, uint32_t done) {
    uint32_t unit = piece * header.piece_units + done;
    const uint32_t end = min(header.units, (piece + 1) * header.piece_units);
    while (unit < end) {
      const RelayedPrefix relayed = args_.plan.relayed[RelayedAt(header, unit)];
      const PrefixItem item = ItemAt(args_.shape, relayed, piece, unit, end);
      const UnitSource source =
          Base::Source(0, item.head, item.prefix, item.prefix_tokens, item.begin, item.end);
      const int32_t places = Base::Places(source, 0);
      Publish(WorkKind::kPrefix, places, [&](Work& work) {
        if (lane_ == 0) work.prefix = item;
      });
      unit += (item.end - item.begin + kTileTokens - 1) / kTileTokens;
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

  // A CTA whose first work nobody has taken, or kNone.
  __device__ uint32_t Unbegun() const {
    uint32_t unbegun = kNone;
#pragma unroll 5
    for (uint32_t i = lane_; i < gridDim.x; i += 32) {
      const uint32_t cta = (blockIdx.x + i) % gridDim.x;
      if (ptx::LoadRelaxed(&args_.plan.begun[cta]) == 0) unbegun = min(unbegun, cta);
    }
    return __reduce_min_sync(~0U, unbegun);
  }

  // The last CTA leaves the counters as the next launch needs them.
  __device__ void Leave() {
    PlanHeader& header = *args_.plan.header;
    __threadfence();
    const uint32_t left = Broadcast(lane_ == 0 ? atomicAdd(&header.finished_ctas, 1) : 0);
    if (left != gridDim.x - 1) return;
    for (uint32_t i = lane_; i < gridDim.x; i += 32) args_.plan.begun[i] = 0;
    if (lane_ == 0) header.next_suffix = header.finished_ctas = 0;
  }

  uint32_t begun_ = 0;
  FirstWords first_ = {};
  uint32_t ticket_ = 0;
  uint32_t next_ticket_ = 0;
  PlanHeader header_;
  RingPosition<S::kWorkSlots> last_;
  uint32_t first_ticket_ = 0;
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
      // The words that both kinds of item have in the same places.
      const SuffixItem& item = work.suffix;
      const UnitSource source = Base::Source(item.request, item.head, item.prefix,
                                             item.prefix_tokens, item.begin, item.end);
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
