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

// The same of a part.
__device__ __forceinline__ void StorePart(float* to, const float (&x)[4]) {
  __stcg(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
}
__device__ __forceinline__ void StorePart(float* to, const float (&x)[2]) {
  __stcg(reinterpret_cast<float2*>(to), make_float2(x[0], x[1]));
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

// One warp: query heads [first_row, first_row + row_count) of a head. In order of position, so that
// equal parts give equal bits.
template <typename T, uint32_t kHeadDim>
__device__ void MergeRows(const AttendArgs& args, const PartRows& rows, uint32_t request,
                          uint32_t head, uint32_t first_row, uint32_t row_count) {
  constexpr uint32_t kWidth = kHeadDim / 32;  // columns of a lane
  constexpr uint32_t kLoads = 16;             // in flight
  using Columns = std::conditional_t<kWidth == 4, float4, float2>;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t parts = rows.count();
  const uint64_t out_row = (uint64_t{request} * args.shape.heads + head) * args.shape.group;
  const uint32_t end_row = first_row + row_count;
  // What is loaded next, and what is added next.
  uint32_t load_row = first_row;
  uint32_t load_part = 0;
  uint32_t row = first_row;
  uint32_t part = 0;
  float max = -INFINITY;
  float sum = 0;
  float acc[kWidth] = {};
  while (row < end_row) {
    Columns x[kLoads];
    float2 s[kLoads];
#pragma unroll
    for (uint32_t i = 0; i < kLoads; ++i) {
      if (load_row >= end_row) break;
      const uint32_t part_row = rows.Row(load_part) + load_row;
      x[i] = __ldcg(
          reinterpret_cast<const Columns*>(args.plan.part_rows + uint64_t{part_row} * kHeadDim) +
          lane);
      s[i] = __ldcg(&args.plan.part_sums[part_row]);
      if (++load_part == parts) load_part = 0, ++load_row;
    }
#pragma unroll
    for (uint32_t i = 0; i < kLoads; ++i) {
      if (row >= end_row) break;
      const float larger = fmaxf(max, s[i].x);
      const float base = larger == -INFINITY ? 0 : larger;
      const float shrink = ptx::Exp2(max - base);
      const float weight = ptx::Exp2(s[i].x - base);
      max = larger;
      sum = sum * shrink + weight * s[i].y;
#pragma unroll
      for (uint32_t d = 0; d < kWidth; ++d) {
        acc[d] = acc[d] * shrink + weight * reinterpret_cast<const float*>(&x[i])[d];
      }
      if (++part < parts) continue;
      const float scale = Reciprocal(sum);
#pragma unroll
      for (uint32_t d = 0; d < kWidth; ++d) acc[d] *= scale;
      StoreOut<T>(static_cast<T*>(args.out) + (out_row + row) * kHeadDim + lane * kWidth, acc);
      if (lane == 0) args.lse[out_row + row] = LogSumExp(max, sum);
      part = 0, ++row;
      max = -INFINITY, sum = 0;
#pragma unroll
      for (uint32_t d = 0; d < kWidth; ++d) acc[d] = 0;
    }
  }
}

// Warp `warp` of the `warps` that merge. Where these are more than all query heads, each takes at
// most one of them; else requests and heads are taken by ticket, by those warps first that have
// nothing left to attend to.
template <typename T, uint32_t kHeadDim>
__device__ void MergeParts(const AttendArgs& args, uint32_t warp, uint32_t warps) {
  PlanHeader& header = *args.plan.header;
  const uint32_t merges = header.merges;
  if (merges == 0) return;
  const uint32_t group = args.shape.group;
  const uint32_t heads = args.shape.heads;
  const uint32_t sharers = merges * group <= warps ? group : 1;  // warps of a request and head
  const bool first_lane = threadIdx.x % 32 == 0;
  const auto ticket = [&] {
    return sharers == 1 && first_lane ? atomicAdd(&header.next_merge, 1) : kNone;
  };
  // Every warp's last ticket is past the end, so that the last of all is known.
  const auto taken = [&](uint32_t mine) {
    if (first_lane && mine == merges + warps - 1) header.next_merge = 0;
    return __shfl_sync(~0U, mine, 0);
  };
  uint32_t i = sharers == 1 ? taken(ticket()) : warp;
  while (i < merges * sharers) {
    const uint32_t merge = i / sharers;
    const uint32_t request = merge / heads;
    const uint32_t head = merge % heads;
    const PartRows rows = FindParts(args.shape, args.plan, args.plan.requests[request], head);
    const bool alone = rows.prefix_parts == 0 && rows.suffix_parts < 2;  // its only item wrote it
    uint32_t* written = &args.plan.contributions[merge];
    while (!alone && ptx::LoadAcquire(written) < rows.count()) {
    }
    const uint32_t next = ticket();  // on its way meanwhile
    if (!alone) {
      MergeRows<T, kHeadDim>(args, rows, request, head, i % sharers, group / sharers);
      // The last of the sharers leaves the count as the next launch needs it.
      if (first_lane && (sharers == 1 || atomicAdd(written, 1) == rows.count() + sharers - 1)) {
        *written = 0;
      }
    }
    i = taken(next);
  }
}

}  // namespace kvrelay::attention::cuda
