// The consumer of a suffix item, one warp: some tokens of one request and head. The products are
// the other way round than usual, S^T = K Q^T and O^T = V^T P^T: tokens (then columns) fill the 16
// rows of the tensor cores' tile and the few query heads the 8 columns, so that little of it is
// padding. A warp takes a whole tile of 128 tokens at a time (64 of more than 8 query heads), as
// many chains of products as it has units of 16 tokens, and the warps of a CTA take items in turn:
// none waits for another.
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
  static constexpr uint32_t kUnits = kUnitsPerTile / kQueryTiles;  // at a time
  static constexpr uint32_t kWidth = kHeadDim / 32;

  __device__ SuffixAttention(Consumer<kHeadDim>& consumer, const SuffixItem& item, uint32_t q_slot)
      : c_(consumer), item_(item), q_slot_(q_slot), tokens_(item.end - item.begin) {
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) max_[n][0] = max_[n][1] = -INFINITY;
  }

  __device__ void Run() {
    c_.WaitTurn();
    for (uint32_t begin = 0; begin < tokens_; begin += kTileTokens) {
      const uint32_t valid = min(kTileTokens, tokens_ - begin);
      const RingPosition<S::kStages> k = c_.ring;
      c_.ring.Next();
      const RingPosition<S::kStages> v = c_.ring;
      c_.ring.Next();
      c_.WaitFull(k.slot, k.parity);
      c_.WaitFull(v.slot, v.parity);
      if (begin + kTileTokens >= tokens_) c_.PassTurn();
      if (begin == 0) LoadQuery();
      if (valid < kTileTokens) ClearTokens(StageAddress(v.slot, 0), valid);
#pragma unroll 1
      for (uint32_t chunk = 0; chunk < kQueryTiles; ++chunk) {
        float s[kQueryTiles][kUnits][4] = {};
        Logits(StageAddress(k.slot, chunk), s);
        if (valid < kTileTokens) MaskLogits(chunk * kUnits * kUnitTokens, valid, s);
        Softmax(s);
        Outputs(StageAddress(v.slot, chunk), s);
      }
      if (begin == 0) c_.WaitReleases();
      c_.ReleaseAlone(k.slot);
      c_.ReleaseAlone(v.slot);
    }
    if (tokens_ == 0) {
      c_.WaitReleases();
      c_.PassTurn();
    }
    c_.PassReleases();
    Finish();
  }

 private:
  __device__ uint32_t StageAddress(uint32_t slot, uint32_t chunk) const {
    return ptx::SharedAddress(c_.shared.ring[slot]) + chunk * (kUnits * S::kUnitBytes);
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

  __device__ void Logits(uint32_t stage, float (&s)[kQueryTiles][kUnits][4]) const {
    const uint32_t matrix = c_.lane / 8;
    const uint32_t row = c_.lane % 8;
#pragma unroll
    for (uint32_t step = 0; step < kSteps; ++step) {
#pragma unroll
      for (uint32_t u = 0; u < kUnits; ++u) {
        uint32_t k[4];
        ptx::LoadMatrix(k,
                        RowUnit(stage + u * S::kUnitBytes, matrix % 2, 2 * step + matrix / 2, row));
#pragma unroll
        for (uint32_t n = 0; n < kQueryTiles; ++n) {
          ptx::Mma<T>(s[n][u], k, q_[n][step][0], q_[n][step][1]);
        }
      }
    }
  }

  // s[n][u]: tokens lane / 4 and 8 more of unit u, query heads 8n + 2 (lane % 4) and the next.
  __device__ void MaskLogits(uint32_t first, uint32_t valid,
                             float (&s)[kQueryTiles][kUnits][4]) const {
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
#pragma unroll
      for (uint32_t u = 0; u < kUnits; ++u) {
        const uint32_t token = first + u * kUnitTokens + c_.lane / 4;
        if (token >= valid) s[n][u][0] = s[n][u][1] = -INFINITY;
        if (token + 8 >= valid) s[n][u][2] = s[n][u][3] = -INFINITY;
      }
    }
  }

  // s becomes exp2(s - max); older sums shrink.
  __device__ void Softmax(float (&s)[kQueryTiles][kUnits][4]) {
    const float scale = c_.args.shape.scale_log2;
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
      float factor[2];
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        float max = fmaxf(s[n][0][i], s[n][0][i + 2]);
#pragma unroll
        for (uint32_t u = 1; u < kUnits; ++u) {
          max = fmaxf(max, fmaxf(s[n][u][i], s[n][u][i + 2]));
        }
#pragma unroll
        for (uint32_t step = 4; step < 32; step *= 2) {
          max = fmaxf(max, __shfl_xor_sync(~0U, max, step));
        }
        // The first tokens of an item are there, so that the largest is no -inf.
        max = fmaxf(max * scale, max_[n][i]);
        factor[i] = ptx::Exp2(max_[n][i] - max);
        max_[n][i] = max;
        float sum = 0;
#pragma unroll
        for (uint32_t u = 0; u < kUnits; ++u) {
          float& a = s[n][u][i];
          float& b = s[n][u][i + 2];
          a = ptx::Exp2(fmaf(a, scale, -max));
          b = ptx::Exp2(fmaf(b, scale, -max));
          sum += a + b;
        }
        sum_[n][i] = sum_[n][i] * factor[i] + sum;
      }
#pragma unroll
      for (uint32_t step = 0; step < kSteps; ++step) {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) o_[n][step][i] *= factor[i % 2];
      }
    }
  }

  // Slots past the last token may hold anything, and 0 * NaN is NaN.
  __device__ void ClearTokens(uint32_t stage, uint32_t valid) const {
    constexpr uint32_t kRowUnits = kHeadDim / 8;
    for (uint32_t i = valid * kRowUnits + c_.lane; i < kTileTokens * kRowUnits; i += 32) {
      const uint32_t token = i / kRowUnits;
      ptx::StoreShared16(RowUnit(stage, token / 8, i % kRowUnits, token % 8), {});
    }
    ptx::FenceProxyAsync();  // the copy engine writes here next
    __syncwarp();
  }

  __device__ void Outputs(uint32_t stage, const float (&s)[kQueryTiles][kUnits][4]) {
    const uint32_t matrix = c_.lane / 8;
    const uint32_t row = c_.lane % 8;
#pragma unroll
    for (uint32_t u = 0; u < kUnits; ++u) {
      // exp2(s - max) as the second operand.
      uint32_t p[kQueryTiles][2];
#pragma unroll
      for (uint32_t n = 0; n < kQueryTiles; ++n) {
        p[n][0] = ptx::TransposeMatrix(ptx::Pack<T>(s[n][u][0], s[n][u][1]));
        p[n][1] = ptx::TransposeMatrix(ptx::Pack<T>(s[n][u][2], s[n][u][3]));
      }
#pragma unroll
      for (uint32_t step = 0; step < kSteps; ++step) {
        uint32_t v[4];
        ptx::LoadMatrixTransposed(
            v, RowUnit(stage + u * S::kUnitBytes, matrix / 2, 2 * step + matrix % 2, row));
#pragma unroll
        for (uint32_t n = 0; n < kQueryTiles; ++n) ptx::Mma<T>(o_[n][step], v, p[n][0], p[n][1]);
      }
    }
  }

  // Writes the output or a part. The sums, spread over the lanes, become rows through this warp's
  // share of the memory for the queries of prefix items: there is none under way.
  __device__ void Finish() {
    constexpr uint32_t kRowBytes = kHeadDim * sizeof(float);
    static_assert(kConsumerWarps * 8 * kRowBytes == S::kTileBytes);
    const uint32_t rows = ptx::SharedAddress(c_.shared.q) + c_.warp * (8 * kRowBytes);
#pragma unroll
    for (uint32_t n = 0; n < kQueryTiles; ++n) {
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
#pragma unroll
        for (uint32_t step = 4; step < 32; step *= 2) {
          sum_[n][i] += __shfl_xor_sync(~0U, sum_[n][i], step);
        }
        const uint32_t row = 2 * (c_.lane % 4) + i;
#pragma unroll
        for (uint32_t step = 0; step < kSteps; ++step) {
          const uint32_t column = step * 16 + c_.lane / 4;
          ptx::StoreShared4(rows + row * kRowBytes + Column(row, column), o_[n][step][i]);
          ptx::StoreShared4(rows + row * kRowBytes + Column(row, column + 8), o_[n][step][i + 2]);
        }
      }
      __syncwarp();
      const uint32_t count = min(8U, c_.args.shape.group - min(c_.args.shape.group, 8 * n));
#pragma unroll 2
      for (uint32_t r = 0; r < count; ++r) {
        float acc[kWidth];
        ptx::LoadShared(acc, rows + r * kRowBytes + Column(r, c_.lane * kWidth));
        StoreRow(8 * n + r, acc, OfRow(max_[n], r), OfRow(sum_[n], r));
      }
      __syncwarp();
    }
    if (item_.alone == 0 && c_.lane == 0) c_.PartWritten(item_.request, item_.head);
  }
  // Where a column of a row stands, in bytes: without bank conflicts among the rows that are
  // written at a time.
  __device__ static uint32_t Column(uint32_t row, uint32_t column) {
    return (column ^ row / 2 % 4 * 8) * sizeof(float);
  }

  // What the lanes that compute row r have of it.
  __device__ static float OfRow(const float (&x)[2], uint32_t r) {
    const float even = __shfl_sync(~0U, x[0], static_cast<int>(r / 2));
    const float odd = __shfl_sync(~0U, x[1], static_cast<int>(r / 2));
    return r % 2 == 0 ? even : odd;
  }

  // Columns kWidth * lane and on of query head `r`.
  __device__ void StoreRow(uint32_t r, float (&acc)[kWidth], float max, float sum) const {
    const AttendShape& shape = c_.args.shape;
    if (item_.alone == 0) {
      const uint64_t row = c_.args.plan.first_suffix_row + item_.part * shape.group + r;
      StorePart(c_.args.plan.part_rows + row * kHeadDim + c_.lane * kWidth, acc);
      if (c_.lane == 0) c_.args.plan.part_sums[row] = {max, sum};
      return;
    }
    const float scale = Reciprocal(sum);
#pragma unroll
    for (uint32_t d = 0; d < kWidth; ++d) acc[d] *= scale;
    const uint64_t row = (uint64_t{item_.request} * shape.heads + item_.head) * shape.group + r;
    StoreOut<T>(static_cast<T*>(c_.args.out) + row * kHeadDim + c_.lane * kWidth, acc);
    if (c_.lane == 0) c_.args.lse[row] = LogSumExp(max, sum);
  }

  Consumer<kHeadDim>& c_;
  const SuffixItem item_;
  const uint32_t q_slot_;
  const uint32_t tokens_;
  uint32_t q_[kQueryTiles][kSteps][2];
  float o_[kQueryTiles][kSteps][4] = {};
  float max_[kQueryTiles][2];
  float sum_[kQueryTiles][2] = {};
};

}  // namespace kvrelay::attention::cuda
