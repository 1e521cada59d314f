// A tile's rows of Q on their way to shared memory.
#pragma once

#include "attention/cuda/paged_keys.cuh"
#include "attention/cuda/ptx.h"
#include "attention/cuda/ptx_mma.h"

namespace kvrelay::attention::cuda {

__device__ __forceinline__ float LoadNumber(DType dtype, const void* q, uint64_t element) {
  if (dtype == DType::kBf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(q)[element]);
  return __half2float(static_cast<const __half*>(q)[element]);
}

// The tile's rows of Q to shared memory; rows that there are not are zeros. Asynchronously, as part
// of the group of copies that follows.
template <uint32_t kDim, uint32_t kRows>
__device__ __forceinline__ void StageQuery(const PagedArgs& args, const PagedWork& work,
                                           uint32_t to) {
  constexpr uint32_t kUnits = kDim / 8;
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < kRows * kUnits; i += blockDim.x) {
    const uint32_t row = i / kUnits;
    const bool is = row < work.tile.rows;
    const uint64_t index = PagedRow(args, work, is ? row : 0).index;
    ptx::CopyAsync16(to + SharedRows<kUnits>::Place(row, i % kUnits),
                     static_cast<const uint4*>(args.q) + index * kUnits + i % kUnits, is);
  }
}

// The same for an 8-bit cache: each row is scaled by a power of 2, which is undone by its query
// scale, so that fp16 holds it, and its columns are in the order of the operands. Synchronously.
template <typename Numbers, uint32_t kDim, uint32_t kRows>
__device__ __forceinline__ void StageScaledQuery(const PagedArgs& args, const PagedWork& work,
                                                 uint32_t to, float* query_scales) {
  constexpr uint32_t kUnits = kDim / 8;
  constexpr uint32_t kBatch = 4;  // rows that a warp has on their way
  const uint32_t lane = threadIdx.x % 32;
  const bool has_unit = lane < kUnits;
  // This unit's places hold two columns of every four.
  const uint32_t column = lane / 2 * 16 + lane % 2 * 2;
#pragma unroll 1
  for (uint32_t first = threadIdx.x / 32 * kBatch; first < kRows;
       first += blockDim.x / 32 * kBatch) {
    float values[kBatch][8] = {};
#pragma unroll
    for (uint32_t b = 0; b < kBatch; ++b) {
      if (!has_unit || first + b >= work.tile.rows) continue;
      const uint64_t element = PagedRow(args, work, first + b).index * kDim + column;
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) {
        values[b][i] = LoadNumber(args.dtype, args.q, element + i / 2 * 4 + i % 2);
      }
    }
#pragma unroll
    for (uint32_t b = 0; b < kBatch; ++b) {
      float most = 0;
      for (const float value : values[b]) most = fmaxf(most, fabsf(value));
      for (uint32_t distance = 1; distance < 32; distance *= 2) {
        most = fmaxf(most, __shfl_xor_sync(~0U, most, distance));
      }
      const int exponent = most > 0 ? ilogbf(most) : 0;
      if (lane == 0) query_scales[first + b] = ldexpf(Numbers::kFactor, exponent);
      uint4 unit;
      uint32_t* words = &unit.x;
      for (uint32_t i = 0; i < 4; ++i) {
        words[i] = ptx::Pack<__half>(ldexpf(values[b][2 * i], -exponent),
                                     ldexpf(values[b][2 * i + 1], -exponent));
      }
      if (has_unit) ptx::StoreShared16(to + SharedRows<kUnits>::Place(first + b, lane), unit);
    }
  }
  __syncthreads();
}

template <typename Numbers, uint32_t kDim, uint32_t kRows>
__device__ __forceinline__ void StageQueryFor(const PagedArgs& args, const PagedWork& work,
                                              uint32_t to, float* query_scales) {
  if constexpr (Numbers::kBytes == 2) {
    StageQuery<kDim, kRows>(args, work, to);
  } else {
    StageScaledQuery<Numbers, kDim, kRows>(args, work, to, query_scales);
  }
}

}  // namespace kvrelay::attention::cuda
