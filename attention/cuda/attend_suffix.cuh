// Consumers of a suffix item: some tokens of one request and head. The two warpgroups take tiles of
// 128 tokens in turn, so that one computes while the other waits.
//
// The products are the other way round than usual, S^T = K Q^T and O^T = V^T P^T: tokens (then
// columns) fill the 16 rows of the tensor cores' tile and the few query heads the 8 columns, so
// that little of it is padding. For S each warp has 32 of the tokens, for O a quarter of the
// columns; P goes through shared memory in between.
#pragma once

#include "attention/cuda/consume.cuh"
#include "attention/cuda/ptx_mma.h"

namespace kvrelay::attention::cuda {

// kQueryTiles: tiles of 8 query heads.
template <typename T, uint32_t kHeadDim, uint32_t kQueryTiles>
class SuffixAttention {
 public:
  using S = Shared<kHeadDim>;
  static constexpr uint32_t kSteps = kHeadDim / 16;       // of S's products
  static constexpr uint32_t kWarpColumns = kHeadDim / 4;  // of O
  static constexpr uint32_t kColumnTiles = kWarpColumns / 16;
  static constexpr uint32_t kWarpUnits = kUnitsPerTile / 4;  // of 16 tokens, of S

  __device__ SuffixAttention(Consumer<kHeadDim>& consumer, const SuffixItem& item, uint32_t q_slot)
      : c_(consumer),
        item_(item),
        tokens_(item.end - item.begin),
        warpgroup_(consumer.warp / 4),
        warp_(consumer.warp % 4),
        own_(consumer.shared.warpgroups[warpgroup_]) {
    const uint32_t tiles = (tokens_ + kTileTokens - 1) / kTileTokens;
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) max_[n][0] = max_[n][1] = -INFINITY;
    // Which warpgroup has which tile depends on the item alone, so that equal items give equal
    // bits; items of one tile are dealt in turn.
    const uint32_t first = tiles > 1 ? 0 : c_.turn++ % 2;
    for (uint32_t tile = 0; tile < tiles; ++tile) {
      c_.WaitFull(c_.ring.slot, c_.ring.parity);
      const bool mine = (first + tile) % 2 == warpgroup_;
      // Comes with the first tile of K; both need it if both have tiles.
      if (tile == 0 && (mine || tiles > 1)) LoadQuery(q_slot);
      if (mine) {
        Tile(tokens_ - tile * kTileTokens);
      } else {
        // Also lets go of the other's stages: so none is filled again before both have seen it
        // full.
        c_.Release(c_.ring.slot);
        c_.ring.Next();
        c_.WaitFull(c_.ring.slot, c_.ring.parity);
        c_.Release(c_.ring.slot);
        c_.ring.Next();
      }
    }
    AddLanes();
    if (tiles < 2) {
      if (first == warpgroup_) Store();
    } else if (warpgroup_ == 0) {
      c_.exchange_used = true;
      ptx::NamedBarrier(kExchangeFull, kConsumerThreads);
      AddOther();
      ptx::NamedBarrierArrive(kExchangeFree, kConsumerThreads);
      Store();
    } else {
      if (c_.exchange_used) ptx::NamedBarrier(kExchangeFree, kConsumerThreads);
      c_.exchange_used = true;
      GiveOther();
      ptx::NamedBarrierArrive(kExchangeFull, kConsumerThreads);
    }
  }

 private:
  // 16-byte unit u of a row of a tile in shared memory.
  __device__ static uint32_t RowUnit(uint32_t tile, uint32_t row, uint32_t u) {
    return tile + row / 8 * S::kGroupBytes + u / 8 * 1024 + row % 8 * 128 +
           ((u % 8) ^ (row % 8)) * 16;
  }

  __device__ void LoadQuery(uint32_t slot) {
    // Columns of query heads that do not exist repeat the last one; nobody reads their results.
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
      const uint32_t row = min(n * 8 + c_.lane % 8, c_.args.shape.group - 1);
      const uint32_t from = ptx::SharedAddress(c_.shared.suffix_q[slot][row]);
#pragma unroll
      for (uint32_t step = 0; step < kSteps; step += 2) {
        uint32_t four[4];
        ptx::LoadMatrix(four, from + step * 32 + c_.lane / 8 * 16);
        q_[n][step][0] = four[0], q_[n][step][1] = four[1];
        q_[n][step + 1][0] = four[2], q_[n][step + 1][1] = four[3];
      }
    }
  }

  // The next tile of the ring, of which the first `tokens` slots hold tokens. Its K is there.
  __device__ __forceinline__ void Tile(uint32_t tokens) {
    float s[kQueryTiles][kWarpUnits][4] = {};
    if (warp_ * kWarpUnits * kUnitTokens < tokens) Logits(s);
    c_.Release(c_.ring.slot);
    c_.ring.Next();
    Softmax(tokens, s);
    ptx::NamedBarrier(kWarpgroupBarrier + warpgroup_, 128);
    c_.WaitFull(c_.ring.slot, c_.ring.parity);
    if (tokens < kTileTokens) ClearTokens(tokens);
    Outputs(tokens);
    c_.Release(c_.ring.slot);
    c_.ring.Next();
  }

  __device__ __forceinline__ void Logits(float (&s)[kQueryTiles][kWarpUnits][4]) const {
    const uint32_t k = ptx::SharedAddress(c_.shared.ring[c_.ring.slot]);
    const uint32_t row = c_.lane % 16;
#pragma unroll
    for (uint32_t step = 0; step < kSteps; ++step) {
#pragma unroll
      for (uint32_t unit = 0; unit < kWarpUnits; ++unit) {
        uint32_t a[4];
        ptx::LoadMatrix(a, RowUnit(k, (warp_ * kWarpUnits + unit) * kUnitTokens + row,
                                   2 * step + c_.lane / 16));
#pragma unroll
        for (uint32_t n = 0; n < kQueryTiles; ++n) {
          ptx::Mma<T>(s[n][unit], a, q_[n][step][0], q_[n][step][1]);
        }
      }
    }
  }

  // s[n][unit]: tokens lane / 4 and 8 more of the unit, query heads 8n + 2 (lane % 4) and the next.
  // Leaves exp2(s - max) of all warps' tokens in shared memory, for max that all warps agree on.
  __device__ __forceinline__ void Softmax(uint32_t tokens, float (&s)[kQueryTiles][kWarpUnits][4]) {
    const uint32_t first = warp_ * kWarpUnits * kUnitTokens + c_.lane / 4;
    const uint32_t column = 2 * (c_.lane % 4);
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
      float2 max = {-INFINITY, -INFINITY};
#pragma unroll
      for (uint32_t unit = 0; unit < kWarpUnits; ++unit) {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
          float& x = s[n][unit][i];
          const bool valid = first + unit * kUnitTokens + i / 2 * 8 < tokens;
          x = valid ? x * c_.args.shape.scale_log2 : -INFINITY;
          (i % 2 == 0 ? max.x : max.y) = fmaxf(i % 2 == 0 ? max.x : max.y, x);
        }
      }
#pragma unroll
      for (uint32_t step = 4; step < 32; step *= 2) {
        max.x = fmaxf(max.x, __shfl_xor_sync(~0U, max.x, step));
        max.y = fmaxf(max.y, __shfl_xor_sync(~0U, max.y, step));
      }
      if (c_.lane < 4) own_.max[warp_][n * 4 + c_.lane] = max;
    }
    ptx::NamedBarrier(kWarpgroupBarrier + warpgroup_, 128);
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
      float base[2];
      float2 max = {max_[n][0], max_[n][1]};
#pragma unroll
      for (uint32_t w = 0; w < 4; ++w) {
        const float2 theirs = own_.max[w][n * 4 + c_.lane % 4];
        max = {fmaxf(max.x, theirs.x), fmaxf(max.y, theirs.y)};
      }
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const float larger = i == 0 ? max.x : max.y;
        base[i] = larger == -INFINITY ? 0 : larger;
        const float factor = ptx::Exp2(max_[n][i] - base[i]);
        max_[n][i] = larger;
        sum_[n][i] *= factor;
#pragma unroll
        for (uint32_t tile = 0; tile < kColumnTiles; ++tile) {
          o_[n][tile][i] *= factor;
          o_[n][tile][i + 2] *= factor;
        }
      }
#pragma unroll
      for (uint32_t unit = 0; unit < kWarpUnits; ++unit) {
        float(&x)[4] = s[n][unit];
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
          x[i] = ptx::Exp2(x[i] - base[i % 2]);
          sum_[n][i % 2] += x[i];
        }
        uint32_t* to = reinterpret_cast<uint32_t*>(
            &own_.p[n * 8 + c_.lane / 4][(warp_ * kWarpUnits + unit) * kUnitTokens + column]);
        to[0] = ptx::TransposeMatrix(ptx::Pack<T>(x[0], x[1]));
        to[4] = ptx::TransposeMatrix(ptx::Pack<T>(x[2], x[3]));
      }
    }
  }

  // Slots past the last token may hold anything, and 0 * NaN is NaN.
  __device__ void ClearTokens(uint32_t tokens) const {
    constexpr uint32_t kUnits = kHeadDim / 8;
    const uint32_t end = min(kTileTokens, (tokens + kUnitTokens - 1) / kUnitTokens * kUnitTokens);
    const uint32_t v = ptx::SharedAddress(c_.shared.ring[c_.ring.slot]);
    for (uint32_t i = tokens * kUnits + c_.thread % 128; i < end * kUnits; i += 128) {
      ptx::StoreShared16(RowUnit(v, i / kUnits, i % kUnits), {});
    }
    ptx::FenceProxyAsync();  // the copy engine writes here next
    ptx::NamedBarrier(kWarpgroupBarrier + warpgroup_, 128);
  }

  __device__ __forceinline__ void Outputs(uint32_t tokens) {
    const uint32_t v = ptx::SharedAddress(c_.shared.ring[c_.ring.slot]);
    const uint32_t row = c_.lane / 16 * 8 + c_.lane % 8;
#pragma unroll
    for (uint32_t unit = 0; unit < kUnitsPerTile; unit += 2) {
      if (unit * kUnitTokens >= tokens) break;
      uint32_t p[kQueryTiles][4];
#pragma unroll
      for (uint32_t n = 0; n < kQueryTiles; ++n) {
        ptx::LoadMatrix(
            p[n],
            ptx::SharedAddress(&own_.p[n * 8 + c_.lane % 8][unit * kUnitTokens + c_.lane / 8 * 8]));
      }
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        if ((unit + half) * kUnitTokens >= tokens) break;
#pragma unroll
        for (uint32_t tile = 0; tile < kColumnTiles; ++tile) {
          uint32_t a[4];
          ptx::LoadMatrixTransposed(
              a, RowUnit(v, (unit + half) * kUnitTokens + row,
                         (warp_ * kWarpColumns + tile * 16) / 8 + c_.lane / 8 % 2));
#pragma unroll
          for (uint32_t n = 0; n < kQueryTiles; ++n) {
            ptx::Mma<T>(o_[n][tile], a, p[n][2 * half], p[n][2 * half + 1]);
          }
        }
      }
    }
  }

  // The sums of this warp's tokens, in all its lanes.
  __device__ __forceinline__ void AddLanes() {
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
#pragma unroll
        for (uint32_t step = 4; step < 32; step *= 2) {
          sum_[n][i] += __shfl_xor_sync(~0U, sum_[n][i], step);
        }
      }
    }
  }

  // What the second warpgroup found, through shared memory, to the first.
  __device__ void GiveOther() const {
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
      auto& to = c_.shared.exchange[n];
#pragma unroll
      for (uint32_t tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) to.o[tile * 4 + i][c_.thread % 128] = o_[n][tile][i];
      }
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        to.max[i][c_.thread % 128] = max_[n][i];
        to.sum[i][c_.thread % 128] = sum_[n][i];
      }
    }
  }
  __device__ void AddOther() {
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
      const auto& from = c_.shared.exchange[n];
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const float theirs = from.max[i][c_.thread];
        const float max = fmaxf(max_[n][i], theirs);
        const float base = max == -INFINITY ? 0 : max;
        const float mine_by = ptx::Exp2(max_[n][i] - base);
        const float theirs_by = ptx::Exp2(theirs - base);
        max_[n][i] = max;
        sum_[n][i] = sum_[n][i] * mine_by + from.sum[i][c_.thread] * theirs_by;
#pragma unroll
        for (uint32_t tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
          for (uint32_t j = i; j < 4; j += 2) {
            o_[n][tile][j] = o_[n][tile][j] * mine_by + from.o[tile * 4 + j][c_.thread] * theirs_by;
          }
        }
      }
    }
  }

  // One warpgroup: writes the output or a part.
  __device__ void Store() {
    const AttendShape& shape = c_.args.shape;
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
      if (c_.lane < 4) own_.sum[warp_][n * 4 + c_.lane] = {sum_[n][0], sum_[n][1]};
    }
    ptx::NamedBarrier(kWarpgroupBarrier + warpgroup_, 128);
    const bool whole = item_.contributions < 2;
    const uint64_t out_row = (uint64_t{item_.request} * shape.heads + item_.head) * shape.group;
    const uint64_t part_row = c_.args.plan.first_suffix_row + item_.part * shape.group;
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
      float2 sum = {};
#pragma unroll
      for (uint32_t w = 0; w < 4; ++w) {
        const float2 theirs = own_.sum[w][n * 4 + c_.lane % 4];
        sum.x += theirs.x, sum.y += theirs.y;
      }
      const uint32_t head = n * 8 + 2 * (c_.lane % 4);
      if (c_.thread % 128 < 4) {
        StoreSum(out_row, part_row, head, max_[n][0], sum.x, whole);
        StoreSum(out_row, part_row, head + 1, max_[n][1], sum.y, whole);
      }
      if (whole) {
        const float2 scale = {Reciprocal(sum.x), Reciprocal(sum.y)};
#pragma unroll
        for (uint32_t tile = 0; tile < kColumnTiles; ++tile) {
          const float(&o)[4] = o_[n][tile];
          const uint32_t low = ptx::TransposeMatrix(ptx::Pack<T>(o[0] * scale.x, o[1] * scale.y));
          const uint32_t high = ptx::TransposeMatrix(ptx::Pack<T>(o[2] * scale.x, o[3] * scale.y));
          const uint32_t transposed_head = n * 8 + c_.lane / 4;
          if (transposed_head >= shape.group) continue;
          auto* to = reinterpret_cast<uint32_t*>(
              static_cast<T*>(c_.args.out) + (out_row + transposed_head) * kHeadDim +
              warp_ * kWarpColumns + tile * 16 + 2 * (c_.lane % 4));
          to[0] = low;
          to[4] = high;
        }
      } else {
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
          if (head + i >= shape.group) continue;
          float* to = c_.args.plan.part_rows + (part_row + head + i) * kHeadDim +
                      warp_ * kWarpColumns + c_.lane / 4;
#pragma unroll
          for (uint32_t tile = 0; tile < kColumnTiles; ++tile) {
            to[tile * 16] = o_[n][tile][i];
            to[tile * 16 + 8] = o_[n][tile][i + 2];
          }
        }
      }
    }
    ptx::NamedBarrier(kWarpgroupBarrier + warpgroup_, 128);  // written; own_ is free
    if (!whole && c_.thread % 128 == 0) c_.PartWritten(item_.request, item_.head);
  }

  __device__ void StoreSum(uint64_t out_row, uint64_t part_row, uint32_t head, float max, float sum,
                           bool whole) const {
    if (head >= c_.args.shape.group) return;
    if (whole) {
      c_.args.lse[out_row + head] = LogSumExp(max, sum);
    } else {
      c_.args.plan.part_sums[part_row + head] = {max, sum};
    }
  }

  Consumer<kHeadDim>& c_;
  const SuffixItem& item_;
  const uint32_t tokens_;
  const uint32_t warpgroup_;
  const uint32_t warp_;  // in the warpgroup
  typename S::Warpgroup& own_;
  uint32_t q_[kQueryTiles][kSteps][2];
  float o_[kQueryTiles][kColumnTiles][4] = {};
  float max_[kQueryTiles][2];
  float sum_[kQueryTiles][2] = {};
};

}  // namespace kvrelay::attention::cuda
