// Adding up the parts of query rows.
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
                                              const RequestPlan& request, uint32_t head) {
  PartRows rows;
  if (request.kv_tiles != 0) {
    const uint32_t segment = head * request.segment_step;
    const uint32_t unit = request.unit + segment * request.kv_tiles;
    const uint32_t first_piece = unit / plan.header->piece_units;
    const uint32_t last_piece = (unit + request.kv_tiles - 1) / plan.header->piece_units;
    rows.prefix_row = (request.segment + segment + first_piece) * kTileRows + request.tile_row;
    rows.prefix_parts = last_piece - first_piece + 1;
  }
  rows.suffix_row = plan.first_suffix_row + (request.first_part + head) * shape.group;
  rows.suffix_parts = request.suffix_chunks;
  rows.suffix_step = shape.heads * shape.group;
  return rows;
}

// One warp: the query heads of a head, kRows at a time. In order of position, so that equal parts
// give equal bits.
template <typename T, uint32_t kHeadDim>
__device__ void MergeHead(const AttendArgs& args, const PartRows& rows, uint32_t request,
                          uint32_t head) {
  constexpr uint32_t kWidth = kHeadDim / 32;  // columns of a lane
  constexpr uint32_t kRows = 4;
  constexpr uint32_t kParts = 4;  // in flight
  using Columns = std::conditional_t<kWidth == 4, float4, float2>;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t group = args.shape.group;
  for (uint32_t first_row = 0; first_row < group; first_row += kRows) {
    float max[kRows];
    float sum[kRows] = {};
    float acc[kRows][kWidth] = {};
#pragma unroll
    for (uint32_t r = 0; r < kRows; ++r) max[r] = -INFINITY;
    for (uint32_t first = 0; first < rows.count(); first += kParts) {
      Columns x[kRows][kParts];
      float2 s[kRows][kParts];
#pragma unroll
      for (uint32_t p = 0; p < kParts; ++p) {
        const uint32_t part_row = rows.Row(first + p) + first_row;
#pragma unroll
        for (uint32_t r = 0; r < kRows; ++r) {
          x[r][p] = {};
          s[r][p] = {-INFINITY, 0};
          if (first + p >= rows.count() || first_row + r >= group) continue;
          x[r][p] = __ldcg(reinterpret_cast<const Columns*>(
              args.plan.part_rows + uint64_t{part_row + r} * kHeadDim + lane * kWidth));
          s[r][p] = __ldcg(&args.plan.part_sums[part_row + r]);
        }
      }
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) {
        float larger = max[r];
#pragma unroll
        for (uint32_t p = 0; p < kParts; ++p) larger = fmaxf(larger, s[r][p].x);
        const float base = larger == -INFINITY ? 0 : larger;
        const float shrink = ptx::Exp2(max[r] - base);
        max[r] = larger;
        sum[r] *= shrink;
#pragma unroll
        for (uint32_t d = 0; d < kWidth; ++d) acc[r][d] *= shrink;
#pragma unroll
        for (uint32_t p = 0; p < kParts; ++p) {
          const float weight = ptx::Exp2(s[r][p].x - base);
          sum[r] += weight * s[r][p].y;
#pragma unroll
          for (uint32_t d = 0; d < kWidth; ++d) {
            acc[r][d] += weight * reinterpret_cast<const float*>(&x[r][p])[d];
          }
        }
      }
    }
#pragma unroll
    for (uint32_t r = 0; r < kRows; ++r) {
      if (first_row + r >= group) continue;
      const float scale = Reciprocal(sum[r]);
#pragma unroll
      for (uint32_t d = 0; d < kWidth; ++d) acc[r][d] *= scale;
      const uint64_t row = (uint64_t{request} * args.shape.heads + head) * group + first_row + r;
      StoreOut<T>(static_cast<T*>(args.out) + row * kHeadDim + lane * kWidth, acc[r]);
      if (lane == 0) args.lse[row] = LogSumExp(max[r], sum[r]);
    }
  }
}

// One warp: takes requests and heads until there are none left.
template <typename T, uint32_t kHeadDim>
__device__ void MergeParts(const AttendArgs& args) {
  PlanHeader& header = *args.plan.header;
  const uint32_t merges = header.merges;
  if (merges == 0) return;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t heads = args.shape.heads;
  const uint32_t runs = header.runs + 1;
  const auto ticket = [&] { return lane == 0 ? atomicAdd(&header.next_merge, 1) : 0; };
  uint32_t next = ticket();
  while (true) {
    const uint32_t merge = __shfl_sync(~0U, next, 0);
    if (merge >= merges) return;
    next = ticket();
    const uint32_t request = merge / heads;
    const uint32_t head = merge % heads;
    const PartRows rows = FindParts(args.shape, args.plan, args.plan.requests[request], head);
    if (rows.prefix_parts == 0 && rows.suffix_parts < 2) continue;  // its only item wrote it
    while (ptx::LoadAcquire(&args.plan.contributions[merge]) != runs * rows.count()) {
    }
    MergeHead<T, kHeadDim>(args, rows, request, head);
  }
}

}  // namespace kvrelay::attention::cuda
