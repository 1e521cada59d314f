// Consumers of a suffix item: some tokens of one request and head. A warp takes every eighth unit
// of 16 tokens. The products are the other way round than usual, S^T = K Q^T and O^T = V^T P^T:
// tokens (then columns) fill the 16 rows of the tensor cores' tile and the few query heads the 8
// columns, so that little of it is padding.
#pragma once

#include "attention/cuda/consume.cuh"
#include "attention/cuda/ptx_mma.h"

namespace kvrelay::attention::cuda {

// kQueryTiles: tiles of 8 query heads.
template <typename T, uint32_t kHeadDim, uint32_t kQueryTiles>
class SuffixAttention {
 public:
  using S = Shared<kHeadDim>;
  static constexpr uint32_t kSteps = kHeadDim / 16;

  __device__ SuffixAttention(Consumer<kHeadDim>& consumer, const SuffixItem& item, uint32_t q_slot)
      : c_(consumer), item_(item), q_slot_(q_slot), tokens_(item.end - item.begin) {
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) max_[n][0] = max_[n][1] = -INFINITY;
  }

  __device__ void Run() {
    const uint32_t tiles = (tokens_ + kTileTokens - 1) / kTileTokens;
    for (uint32_t tile = 0; tile < tiles; ++tile) {
      const uint32_t unit = tile * kUnitsPerTile + c_.warp;
      const bool mine = unit * kUnitTokens < tokens_;
      c_.WaitFull(c_.ring.slot, c_.ring.parity);
      if (tile == 0) LoadQuery();
      float s[kQueryTiles][4] = {};
      if (mine) Logits(UnitAddress(), s);
      c_.Release(c_.ring.slot);
      c_.ring.Next();
      uint32_t p[kQueryTiles][2];
      if (mine) Softmax(unit, s, p);
      c_.WaitFull(c_.ring.slot, c_.ring.parity);
      if (mine) {
        const uint32_t valid = tokens_ - unit * kUnitTokens;
        if (valid < kUnitTokens) ClearTokens(UnitAddress(), valid);
        Outputs(UnitAddress(), p);
      }
      c_.Release(c_.ring.slot);
      c_.ring.Next();
    }
    Finish();
  }

 private:
  __device__ uint32_t UnitAddress() const {
    return ptx::SharedAddress(c_.shared.ring[c_.ring.slot]) + c_.warp * S::kUnitBytes;
  }
  // This lane's row of matrix i of a unit, at 16-byte unit u of the row.
  __device__ static uint32_t RowUnit(uint32_t unit_address, uint32_t token_group, uint32_t u,
                                     uint32_t row) {
    return unit_address + token_group * S::kGroupBytes + u / 8 * 1024 + row * 128 +
           ((u % 8) ^ row) * 16;
  }

  __device__ void LoadQuery() {
    // Columns of query heads that do not exist repeat the last one; nobody reads their results.
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
      const uint32_t row = min(n * 8 + c_.lane % 8, c_.args.shape.group - 1);
      const uint32_t from = ptx::SharedAddress(c_.shared.suffix_q[q_slot_][row]);
#pragma unroll
      for (uint32_t step = 0; step < kSteps; step += 2) {
        uint32_t four[4];
        ptx::LoadMatrix(four, from + step * 32 + c_.lane / 8 * 16);
        q_[n][step][0] = four[0], q_[n][step][1] = four[1];
        q_[n][step + 1][0] = four[2], q_[n][step + 1][1] = four[3];
      }
    }
  }

  __device__ void Logits(uint32_t unit_address, float (&s)[kQueryTiles][4]) const {
    const uint32_t matrix = c_.lane / 8;
    const uint32_t row = c_.lane % 8;
#pragma unroll
    for (uint32_t step = 0; step < kSteps; ++step) {
      uint32_t k[4];
      ptx::LoadMatrix(k, RowUnit(unit_address, matrix % 2, 2 * step + matrix / 2, row));
#pragma unroll
      for (uint32_t n = 0; n < kQueryTiles; ++n) {
        ptx::Mma<T>(s[n], k, q_[n][step][0], q_[n][step][1]);
      }
    }
  }

  // s[n]: tokens lane / 4 and 8 more, query heads 8n + 2 (lane % 4) and the next. p: exp2(s - max)
  // as the second operand of the product with V.
  __device__ void Softmax(uint32_t unit, float (&s)[kQueryTiles][4],
                          uint32_t (&p)[kQueryTiles][2]) {
    const uint32_t token = unit * kUnitTokens + c_.lane / 4;
    const bool low = token < tokens_;
    const bool high = token + 8 < tokens_;
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
      float factor[2];
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        float& a = s[n][i];
        float& b = s[n][i + 2];
        a = low ? a * c_.args.shape.scale_log2 : -INFINITY;
        b = high ? b * c_.args.shape.scale_log2 : -INFINITY;
        float max = fmaxf(fmaxf(a, b), max_[n][i]);
#pragma unroll
        for (uint32_t step = 4; step < 32; step *= 2) {
          max = fmaxf(max, __shfl_xor_sync(~0U, max, step));
        }
        const float base = max == -INFINITY ? 0 : max;
        factor[i] = ptx::Exp2(max_[n][i] - base);
        max_[n][i] = max;
        a = ptx::Exp2(a - base);
        b = ptx::Exp2(b - base);
        sum_[n][i] = sum_[n][i] * factor[i] + a + b;
      }
#pragma unroll
      for (uint32_t step = 0; step < kSteps; ++step) {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) o_[n][step][i] *= factor[i % 2];
      }
      p[n][0] = ptx::TransposeMatrix(ptx::Pack<T>(s[n][0], s[n][1]));
      p[n][1] = ptx::TransposeMatrix(ptx::Pack<T>(s[n][2], s[n][3]));
    }
  }

  // Slots past the last token may hold anything, and 0 * NaN is NaN.
  __device__ void ClearTokens(uint32_t unit_address, uint32_t valid) const {
    constexpr uint32_t kUnits = kHeadDim / 8;
    for (uint32_t i = valid * kUnits + c_.lane; i < kUnitTokens * kUnits; i += 32) {
      const uint32_t token = i / kUnits;
      ptx::StoreShared16(RowUnit(unit_address, token / 8, i % kUnits, token % 8), {});
    }
    ptx::FenceProxyAsync();  // the copy engine writes here next
    __syncwarp();
  }

  __device__ void Outputs(uint32_t unit_address, const uint32_t (&p)[kQueryTiles][2]) {
    const uint32_t matrix = c_.lane / 8;
    const uint32_t row = c_.lane % 8;
#pragma unroll
    for (uint32_t step = 0; step < kSteps; ++step) {
      uint32_t v[4];
      ptx::LoadMatrixTransposed(v, RowUnit(unit_address, matrix / 2, 2 * step + matrix % 2, row));
#pragma unroll
      for (uint32_t n = 0; n < kQueryTiles; ++n) ptx::Mma<T>(o_[n][step], v, p[n][0], p[n][1]);
    }
  }

  // Adds the warps' sums up, and writes the output or a part.
  __device__ void Finish() {
    const AttendShape& shape = c_.args.shape;
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
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
      const uint32_t rows = min(8U, shape.group - min(shape.group, 8 * n));
      if (n > 0) c_.Sync();
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t row = 2 * (c_.lane % 4) + i;
        if (row < rows) {
#pragma unroll
          for (uint32_t step = 0; step < kSteps; ++step) {
            float* to = &c_.shared.sums[c_.warp][row][step * 16 + c_.lane / 4];
            to[0] = o_[n][step][i];
            to[8] = o_[n][step][i + 2];
          }
          if (c_.lane / 4 == 0) c_.shared.row_sums[c_.warp][row] = {max_[n][i], sum_[n][i]};
        }
      }
      c_.Sync();
      if (c_.warp < rows) FinishRow(n * 8 + c_.warp, c_.warp);
    }
    c_.Sync();  // the part is written, and the sums' memory is free
    if (item_.contributions > 1 && c_.thread == 0) c_.PartWritten(item_.request, item_.head);
  }

  // One warp: query head `i`, whose sums stand in row `row` of each warp's.
  __device__ void FinishRow(uint32_t i, uint32_t row) const {
    constexpr uint32_t kWidth = kHeadDim / 32;
    const AttendShape& shape = c_.args.shape;
    float max = -INFINITY;
#pragma unroll
    for (uint32_t w = 0; w < kConsumerWarps; ++w) {
      max = fmaxf(max, c_.shared.row_sums[w][row].x);
    }
    float acc[kWidth] = {};
    float sum = 0;
#pragma unroll
    for (uint32_t w = 0; w < kConsumerWarps; ++w) {
      const float2 theirs = c_.shared.row_sums[w][row];
      const float weight = theirs.x == -INFINITY ? 0 : ptx::Exp2(theirs.x - max);
      sum += weight * theirs.y;
#pragma unroll
      for (uint32_t d = 0; d < kWidth; ++d) {
        acc[d] += weight * c_.shared.sums[w][row][c_.lane * kWidth + d];
      }
    }
    if (item_.contributions > 1) {
      const uint64_t part_row = c_.args.plan.first_suffix_row + item_.part * shape.group + i;
      float* to = c_.args.plan.part_rows + part_row * kHeadDim + c_.lane * kWidth;
#pragma unroll
      for (uint32_t d = 0; d < kWidth; ++d) to[d] = acc[d];
      if (c_.lane == 0) c_.args.plan.part_sums[part_row] = {max, sum};
      return;
    }
    const float scale = Reciprocal(sum);
#pragma unroll
    for (uint32_t d = 0; d < kWidth; ++d) acc[d] *= scale;
    const uint64_t out_row = (uint64_t{item_.request} * shape.heads + item_.head) * shape.group + i;
    StoreOut<T>(static_cast<T*>(c_.args.out) + out_row * kHeadDim + c_.lane * kWidth, acc);
    if (c_.lane == 0) c_.args.lse[out_row] = LogSumExp(max, sum);
  }

  Consumer<kHeadDim>& c_;
  const SuffixItem& item_;
  const uint32_t q_slot_;
  const uint32_t tokens_;
  uint32_t q_[kQueryTiles][kSteps][2];
  float o_[kQueryTiles][kSteps][4] = {};
  float max_[kQueryTiles][2];
  float sum_[kQueryTiles][2] = {};
};

}  // namespace kvrelay::attention::cuda
