// Consumers of a prefix item: a tile of 128 query rows of one head, those of many requests, meets
// some KV tiles of their prefix. Each of the two warpgroups has 64 of the rows. The products of the
// next tile with K run while this tile's softmax is computed, and the warpgroups issue products in
// turns, so that one multiplies while the other computes its softmax.
#pragma once

#include "attention/cuda/consume.cuh"
#include "attention/cuda/ptx_wgmma.h"

namespace kvrelay::attention::cuda {

template <typename T, uint32_t kHeadDim>
class PrefixAttention {
 public:
  using S = Shared<kHeadDim>;
  static constexpr uint32_t kOutputs = kHeadDim / 2;  // accumulators of a thread
  static constexpr uint32_t kWarpgroupRows = kTileRows / 2;
  // Sums are relative to a logit (in units of log 2) that the largest exceeds by at most this.
  static constexpr float kSlack = 8;

  __device__ PrefixAttention(Consumer<kHeadDim>& consumer, const PrefixItem& item)
      : c_(consumer), item_(item), warpgroup_(consumer.warp / 4) {}

  __device__ void Run() {
    const uint32_t rows = item_.requests * c_.args.shape.group;
    both_ = rows > kWarpgroupRows;
    if (warpgroup_ * kWarpgroupRows < rows) {
      LoadQuery(rows);
      Attend();
      StorePart(rows);
    } else {
      for (uint32_t stage = 0; stage < 2 * Tiles(); ++stage) {
        c_.WaitFull(c_.ring.slot, c_.ring.parity);
        c_.Release(c_.ring.slot);
        c_.ring.Next();
      }
    }
    // Loaded before the part is waited for.
    const uint32_t request = c_.thread < item_.requests ? Request(c_.thread) : 0;
    c_.Sync();  // the part is written
    if (c_.thread < item_.requests) c_.PartWritten(request, item_.head);
  }

 private:
  __device__ uint32_t Tokens() const { return item_.end - item_.begin; }
  __device__ uint32_t Tiles() const { return CeilDiv(Tokens(), kTileTokens); }
  // Request `slot` of the tile's.
  __device__ uint32_t Request(uint32_t slot) const {
    return c_.args.plan.members[item_.first_member + slot];
  }

  // This warpgroup's rows into shared memory; rows past the end are zeros.
  __device__ void LoadQuery(uint32_t rows) {
    constexpr uint32_t kUnits = kHeadDim / 8;
    const AttendShape& shape = c_.args.shape;
    const uint32_t q = ptx::SharedAddress(c_.shared.q);
    const auto* from = static_cast<const uint4*>(c_.args.q);
    // All requests, then all units: two trips to memory, not two for each.
    constexpr uint32_t kMine = kWarpgroupRows * kUnits / 128;
    const uint32_t u = c_.thread % kUnits;
    const uint32_t first = warpgroup_ * kWarpgroupRows + c_.thread % 128 / kUnits;
    uint64_t source[kMine];
#pragma unroll
    for (uint32_t i = 0; i < kMine; ++i) {
      const uint32_t row = min(first + i * (128 / kUnits), rows - 1);
      source[i] = (uint64_t{Request(row / shape.group)} * shape.heads + item_.head) * shape.group +
                  row % shape.group;
    }
    uint4 value[kMine];
#pragma unroll
    for (uint32_t i = 0; i < kMine; ++i) value[i] = __ldg(from + source[i] * kUnits + u);
#pragma unroll
    for (uint32_t i = 0; i < kMine; ++i) {
      const uint32_t row = first + i * (128 / kUnits);
      ptx::StoreShared16(
          q + row / 8 * S::kGroupBytes + u / 8 * 1024 + row % 8 * 128 + ((u % 8) ^ (row % 8)) * 16,
          row < rows ? value[i] : uint4{});
    }
    ptx::FenceProxyAsync();
    ptx::NamedBarrier(kWarpgroupBarrier + warpgroup_, 128);
  }

  __device__ __forceinline__ void Logits(uint32_t slot) {
    const uint32_t q = ptx::Opaque(ptx::SharedAddress(c_.shared.q) +
                                   warpgroup_ * (kWarpgroupRows / 8) * S::kGroupBytes);
    const uint32_t k = ptx::SharedAddress(c_.shared.ring[slot]);
    ptx::WarpgroupFence();
#pragma unroll
    for (uint32_t step = 0; step < kHeadDim / 16; ++step) {
      const uint32_t advance = step / 4 * 1024 + step % 4 * 32;
      ptx::WarpgroupDot<T>(s_, ptx::Descriptor(q, S::kGroupBytes, 0, advance),
                           ptx::Descriptor(k, S::kGroupBytes, 0, advance), step > 0);
    }
    ptx::WarpgroupCommit();
  }

  __device__ __forceinline__ void Outputs(uint32_t slot, bool add) {
    const uint32_t v = ptx::SharedAddress(c_.shared.ring[slot]);
    ptx::WarpgroupFence();
#pragma unroll
    for (uint32_t step = 0; step < kTileTokens / 16; ++step) {
      ptx::WarpgroupMma<T>(o_, &p_[4 * step],
                           ptx::Descriptor(v, S::kGroupBytes, 1024, step * S::kUnitBytes),
                           add || step > 0);
    }
    ptx::WarpgroupCommit();
  }

  // Logits of keys past the last become -inf.
  __device__ __forceinline__ void MaskLogits(uint32_t valid) {
#pragma unroll
    for (uint32_t i = 0; i < 64; ++i) {
      const uint32_t column = i / 4 * 8 + 2 * (c_.lane % 4) + i % 2;
      if (column >= valid) s_[i] = -INFINITY;
    }
  }

  // s becomes exp2(s - max) of the two rows of this thread; returns by how much older sums shrink.
  __device__ __forceinline__ float2 Softmax() {
    const float scale = c_.args.shape.scale_log2;
    float factor[2];
#pragma unroll
    for (uint32_t r = 0; r < 2; ++r) {
      float four[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) four[i] = fmaxf(s_[4 * i + 2 * r], s_[4 * i + 2 * r + 1]);
#pragma unroll
      for (uint32_t i = 4; i < 16; ++i) {
        four[i % 4] = fmaxf(four[i % 4], fmaxf(s_[4 * i + 2 * r], s_[4 * i + 2 * r + 1]));
      }
      float max = fmaxf(fmaxf(four[0], four[1]), fmaxf(four[2], four[3]));
      max = fmaxf(max, __shfl_xor_sync(~0U, max, 1));
      max = fmaxf(max, __shfl_xor_sync(~0U, max, 2));
      max = max * scale - max_[r] > kSlack ? max * scale : max_[r];
      const float base = max == -INFINITY ? 0 : max;
      factor[r] = ptx::Exp2(max_[r] - base);
      max_[r] = max;
      float sum = 0;
#pragma unroll
      for (uint32_t i = 0; i < 64; i += 4) {
        float& a = s_[i + 2 * r];
        float& b = s_[i + 2 * r + 1];
        a = ptx::Exp2(fmaf(a, scale, -base));
        b = ptx::Exp2(fmaf(b, scale, -base));
        sum += a + b;
      }
      sum_[r] = sum_[r] * factor[r] + sum;
    }
    return {factor[0], factor[1]};
  }

  __device__ __forceinline__ void PackProbabilities() {
#pragma unroll
    for (uint32_t i = 0; i < 32; ++i) p_[i] = ptx::Pack<T>(s_[2 * i], s_[2 * i + 1]);
  }

  // Slots past the last token may hold anything, and 0 * NaN is NaN. Each warpgroup clears all of
  // them for itself.
  __device__ void ClearTokens(uint32_t slot, uint32_t valid) const {
    constexpr uint32_t kUnits = kHeadDim / 8;
    const uint32_t v = ptx::SharedAddress(c_.shared.ring[slot]);
    for (uint32_t i = valid * kUnits + c_.thread % 128; i < kTileTokens * kUnits; i += 128) {
      const uint32_t row = i / kUnits;
      ptx::StoreShared16(
          v + row / 8 * S::kGroupBytes + i % kUnits / 8 * 1024 + row % 8 * 128 + i % 8 * 16, {});
    }
    ptx::FenceProxyAsync();
    ptx::NamedBarrier(kWarpgroupBarrier + warpgroup_, 128);
  }

  // The warpgroup's turn to issue products, and the other's.
  __device__ __forceinline__ void WaitTurn() const {
    if (both_) ptx::NamedBarrier(kProductsBarrier + warpgroup_, kConsumerThreads);
  }
  __device__ __forceinline__ void PassTurn() const {
    if (both_) ptx::NamedBarrierArrive(kProductsBarrier + 1 - warpgroup_, kConsumerThreads);
  }

  // The products of the next tile with K, and of the tile before with V; `add`: to what there is.
  template <bool kLast>
  __device__ __forceinline__ void Step(bool add, uint32_t valid) {
    const RingPosition<S::kStages> k = c_.ring;
    c_.ring.Next();
    const RingPosition<S::kStages> v = c_.ring;
    c_.ring.Next();
    c_.WaitFull(k.slot, k.parity);
    WaitTurn();
    ptx::Pin(s_);
    ptx::Pin(o_);
    ptx::Pin(p_);
    Logits(k.slot);
    c_.WaitFull(v.slot, v.parity);
    Outputs(v.slot, add);
    if (!kLast || warpgroup_ == 0) PassTurn();
    ptx::WarpgroupWait<1>();
    ptx::Pin(s_);
    c_.Release(k.slot);
    if constexpr (kLast) MaskLogits(valid);
    const float2 factor = Softmax();
    // Here, while the products with V run.
    ptx::Pin(s_);
    ptx::UseHere(valid, __float_as_uint(sum_[0]), __float_as_uint(sum_[1]), 0, 0);
    ptx::WarpgroupWait<0>();
    ptx::Pin(o_);
#pragma unroll
    for (uint32_t i = 0; i < 32; i += 4)
      ptx::UseHere(valid, p_[i], p_[i + 1], p_[i + 2], p_[i + 3]);
    c_.Release(v.slot);
    if (__any_sync(~0U, factor.x != 1 || factor.y != 1)) {
#pragma unroll
      for (uint32_t i = 0; i < kOutputs; i += 4) {
        o_[i] *= factor.x, o_[i + 1] *= factor.x;
        o_[i + 2] *= factor.y, o_[i + 3] *= factor.y;
      }
    }
    PackProbabilities();
  }

  __device__ __forceinline__ void Attend() {
    const uint32_t tiles = Tiles();
    const uint32_t valid = Tokens() - (tiles - 1) * kTileTokens;  // in the last tile

    c_.WaitFull(c_.ring.slot, c_.ring.parity);
    ptx::Pin(s_);
    Logits(c_.ring.slot);
    ptx::WarpgroupWait<0>();
    ptx::Pin(s_);
    c_.Release(c_.ring.slot);
    c_.ring.Next();
    if (tiles == 1 && valid < kTileTokens) MaskLogits(valid);
    Softmax();
    PackProbabilities();

    if (tiles > 1 && warpgroup_ == 1) PassTurn();
    // A branch for the mask inside the loop would make the compiler wait for all products before
    // it.
    for (uint32_t tile = 1; tile + 1 < tiles; ++tile) Step<false>(tile > 1, valid);
    if (tiles > 1) Step<true>(tiles > 2, valid);

    c_.WaitFull(c_.ring.slot, c_.ring.parity);
    if (valid < kTileTokens) ClearTokens(c_.ring.slot, valid);
    ptx::Pin(o_);
    ptx::Pin(p_);
    Outputs(c_.ring.slot, tiles > 1);
    ptx::WarpgroupWait<0>();
    ptx::Pin(o_);
    c_.Release(c_.ring.slot);
    c_.ring.Next();
  }

  __device__ void StorePart(uint32_t rows) {
#pragma unroll
    for (uint32_t r = 0; r < 2; ++r) {
      sum_[r] += __shfl_xor_sync(~0U, sum_[r], 1);
      sum_[r] += __shfl_xor_sync(~0U, sum_[r], 2);
      const uint32_t row = c_.warp * 16 + c_.lane / 4 + 8 * r;
      if (row >= rows) continue;
      const uint64_t part_row = uint64_t{item_.part} * kTileRows + row;
      float* to = c_.args.plan.part_rows + part_row * kHeadDim + 2 * (c_.lane % 4);
#pragma unroll
      for (uint32_t i = 0; i < kOutputs / 4; ++i) {
        __stcg(reinterpret_cast<float2*>(to + 8 * i),
               make_float2(o_[4 * i + 2 * r], o_[4 * i + 2 * r + 1]));
      }
      if (c_.lane % 4 == 0) c_.args.plan.part_sums[part_row] = {max_[r], sum_[r]};
    }
  }

  Consumer<kHeadDim>& c_;
  const PrefixItem& item_;
  const uint32_t warpgroup_;
  bool both_ = false;  // warpgroups have rows
  float s_[64];
  float o_[kOutputs];
  uint32_t p_[32];
  float max_[2] = {-INFINITY, -INFINITY};
  float sum_[2] = {};
};

}  // namespace kvrelay::attention::cuda
