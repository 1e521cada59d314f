// Adding up the parts of a query row, once all of them are there.
#pragma once

#include "attention/cuda/attend_args.h"
#include "attention/cuda/ptx.h"
#include "attention/cuda/ptx_mma.h"

namespace kvrelay::attention::cuda {

// kWidth neighbouring numbers of an output row.
template <typename T, uint32_t kWidth>
__device__ __forceinline__ void StoreOut(T* to, const float (&x)[kWidth]) {
  if constexpr (kWidth == 4) {
    *reinterpret_cast<uint2*>(to) = {ptx::Pack<T>(x[0], x[1]), ptx::Pack<T>(x[2], x[3])};
  } else {
    static_assert(kWidth == 2);
    *reinterpret_cast<uint32_t*>(to) = ptx::Pack<T>(x[0], x[1]);
  }
}

// Sums as outputs: divided, and the log-sum-exp in natural log. No key: zeros and -inf.
__device__ __forceinline__ float Reciprocal(float sum) { return sum > 0 ? 1 / sum : 0; }
__device__ __forceinline__ float LogSumExp(float max_log2, float sum) {
  constexpr float kLn2 = 0.693147180559945F;
  return sum > 0 ? (max_log2 + log2f(sum)) * kLn2 : -INFINITY;
}

// Where the parts of a request and head are: prefix parts' rows kTileRows apart, then suffix parts'
// rows `suffix_step` apart. Row numbers are those of the head's first query head.
struct PartRows {
  uint32_t prefix_row = 0;
  uint32_t prefix_parts = 0;
  uint32_t suffix_row = 0;
  uint32_t suffix_parts = 0;
  uint32_t suffix_step = 0;

  __device__ uint32_t count() const { return prefix_parts + suffix_parts; }
  __device__ uint32_t Row(uint32_t part) const {
    return part < prefix_parts ? prefix_row + part * kTileRows
                               : suffix_row + (part - prefix_parts) * suffix_step;
  }
};

__device__ __forceinline__ PartRows FindParts(const AttendShape& shape, const Plan& plan,
                                              uint32_t request, uint32_t head) {
  const RequestPlan mine = plan.requests[request];
  PartRows rows;
  if (mine.relayed != kNone) {
    const RelayedPrefix relayed = plan.relayed[mine.relayed];
    const uint32_t per_tile = shape.requests_per_tile();
    const uint32_t segment = head * relayed.row_tiles + mine.member / per_tile;
    const uint32_t unit = relayed.first_unit + segment * relayed.kv_tiles;
    const uint32_t first_piece = unit / plan.header->piece_units;
    const uint32_t last_piece = (unit + relayed.kv_tiles - 1) / plan.header->piece_units;
    rows.prefix_row = (relayed.first_segment + segment + first_piece) * kTileRows +
                      mine.member % per_tile * shape.group;
    rows.prefix_parts = last_piece - first_piece + 1;
  }
  rows.suffix_row = plan.first_suffix_row + (mine.first_part + head) * shape.group;
  rows.suffix_parts = mine.suffix_chunks;
  rows.suffix_step = shape.heads * shape.group;
  return rows;
}

// One warp: query head `i` of a head. In order of position, so that equal parts give equal bits.
template <typename T, uint32_t kHeadDim>
__device__ void MergeRow(const AttendArgs& args, const PartRows& rows, uint32_t request,
                         uint32_t head, uint32_t i) {
  constexpr uint32_t kWidth = kHeadDim / 32;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t count = rows.count();
  float max = -INFINITY;
  for (uint32_t part = lane; part < count; part += 32) {
    max = fmaxf(max, __ldcg(&args.plan.part_sums[rows.Row(part) + i]).x);
  }
#pragma unroll
  for (uint32_t step = 16; step > 0; step /= 2) {
    max = fmaxf(max, __shfl_xor_sync(~0U, max, step));
  }
  float acc[kWidth] = {};
  float sum = 0;
  for (uint32_t first = 0; first < count; first += 32) {
    const uint32_t here = min(32U, count - first);
    float2 mine = {-INFINITY, 0};
    if (lane < here) mine = __ldcg(&args.plan.part_sums[rows.Row(first + lane) + i]);
    const float weight = mine.x == -INFINITY ? 0 : ptx::Exp2(mine.x - max);
    const float weighted = weight * mine.y;
#pragma unroll 4
    for (uint32_t part = 0; part < here; ++part) {
      const float* from =
          args.plan.part_rows + uint64_t{rows.Row(first + part) + i} * kHeadDim + lane * kWidth;
      float x[kWidth];
      if constexpr (kWidth == 4) {
        const float4 four = __ldcg(reinterpret_cast<const float4*>(from));
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
      } else {
        const float2 two = __ldcg(reinterpret_cast<const float2*>(from));
        x[0] = two.x, x[1] = two.y;
      }
      const float w = __shfl_sync(~0U, weight, part);
      sum += __shfl_sync(~0U, weighted, part);
#pragma unroll
      for (uint32_t d = 0; d < kWidth; ++d) acc[d] += w * x[d];
    }
  }
  const float scale = Reciprocal(sum);
#pragma unroll
  for (uint32_t d = 0; d < kWidth; ++d) acc[d] *= scale;
  const uint64_t row = (uint64_t{request} * args.shape.heads + head) * args.shape.group + i;
  StoreOut<T>(static_cast<T*>(args.out) + row * kHeadDim + lane * kWidth, acc);
  if (lane == 0) args.lse[row] = LogSumExp(max, sum);
}

}  // namespace kvrelay::attention::cuda
