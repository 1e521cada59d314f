// What all kernels of paged attention do alike: take items, find keys, see which a row sees, and
// write results or parts of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/cuda/paged_args.h"

namespace kvrelay::attention::cuda {

inline constexpr float kLog2E = 1.44269504088896F;
inline constexpr float kLn2 = 0.69314718055995F;

// A CTA's work: keys [begin, end) for the rows of a tile, in one KV head.
struct PagedWork {
  PagedTile tile;
  uint32_t index;  // of the tile
  uint32_t head;
  uint32_t chunk;
  uint32_t begin;
  uint32_t end;
};

// Calls body(work) for items until none is left; `work` lies in shared memory. All threads of all
// CTAs of the launch take part.
template <typename Body>
__device__ __forceinline__ void ForEachItem(const PagedArgs& args, Body&& body) {
  __shared__ PagedWork work;
  __shared__ bool more;
  PagedHeader* header = args.plan.header;
  const uint32_t heads = args.sizes.kv_heads;
  uint32_t next = blockIdx.x;  // of thread 0, which takes it while the item before it is worked on
  while (true) {
    if (threadIdx.x == 0) {
      more = next < header->items * heads;
      if (more) {
        const PagedItem item = args.plan.items[next / heads];
        const PagedTile tile = args.plan.tiles[item.tile];
        const uint32_t begin = tile.begin + item.chunk * tile.chunk;
        work = {tile,       item.tile, next % heads,
                item.chunk, begin,     min(tile.end, begin + tile.chunk)};
        next = gridDim.x + atomicAdd(&header->next, 1);
      }
    }
    __syncthreads();
    if (!more) break;
    body(work);
    __syncthreads();
  }
  if (threadIdx.x == 0 && atomicAdd(&header->finished_ctas, 1) == gridDim.x - 1) {
    header->next = 0;
    header->finished_ctas = 0;
  }
}

// Bytes from the start of a tensor to key `key` of the work's head.
__device__ __forceinline__ uint64_t KeyOffset(const PagedArgs& args, const PagedWork& work,
                                              uint32_t key) {
  const PagedTile& tile = work.tile;
  const uint32_t size = args.sizes.block_size;
  const bool shared = key < tile.shared;
  const uint32_t own = shared ? key : key - tile.shared;
  const BlockId* table =
      shared ? args.prefix_blocks + uint64_t{tile.prefix} * args.prefix_blocks_stride
             : args.blocks + uint64_t{tile.sequence} * args.blocks_stride;
  const LayerCache& cache = args.layer.cache;
  return table[own / size] * cache.block_stride + work.head * cache.head_stride +
         own % size * cache.token_stride;
}

__device__ __forceinline__ float ScaleOf(const float* scales, const LayerScales& layer,
                                         const PagedWork& work) {
  if (scales == nullptr) return 1.0F;
  return scales[work.tile.sequence * layer.sequence_step + work.head * layer.head_step];
}

// One packed row: where it stands in Q, and which keys it sees: [begin, end).
struct PagedRow {
  uint64_t index;  // row * query heads + query head
  uint32_t query_head;
  int32_t position;
  int32_t begin;
  int32_t end;

  __device__ PagedRow(const PagedArgs& args, const PagedWork& work, uint32_t row) {
    const PagedSizes& sizes = args.sizes;
    const uint32_t packed = work.tile.packed + row;
    const uint32_t token = packed / sizes.group;
    query_head = work.head * sizes.group + packed % sizes.group;
    index = uint64_t{work.tile.first_row + token} * (sizes.kv_heads * sizes.group) + query_head;
    position = work.tile.position + static_cast<int32_t>(token);
    end = position + 1;
    begin = sizes.window == 0 ? 0 : max(0, end - static_cast<int32_t>(sizes.window));
  }
};

// From a dot product to a logit in units of log 2.
class LogitOf {
 public:
  // `scale`: of the dot product, K's included.
  __device__ LogitOf(const PagedLayer& layer, float scale)
      : soft_cap_(layer.soft_cap),
        slopes_(layer.alibi_slopes),
        scale_(soft_cap_ == 0 ? scale * kLog2E : scale / soft_cap_) {}
  __device__ bool plain() const { return soft_cap_ == 0 && slopes_ == nullptr; }
  __device__ float scale() const { return scale_; }
  __device__ float Slope(uint32_t query_head) const {
    return slopes_ == nullptr ? 0.0F : slopes_[query_head] * kLog2E;
  }
  // `slope` as above; `distance`: the key's position - the row's.
  __device__ float operator()(float dot, float slope, int32_t distance) const {
    float logit = dot * scale_;
    if (soft_cap_ != 0) {
      // tanh; both ends are right.
      logit = soft_cap_ * kLog2E * (1 - __fdividef(2, exp2f(2 * kLog2E * logit) + 1));
    }
    return logit + slope * static_cast<float>(distance);
  }

 private:
  float soft_cap_;
  const float* slopes_;
  float scale_;
};

// The largest logit as what others are measured from: never -inf.
__device__ __forceinline__ float Finite(float largest) {
  return largest == -INFINITY ? 0.0F : largest;
}

// `kCount` columns of O, in its type.
template <uint32_t kCount>
__device__ __forceinline__ void StoreOut(const PagedArgs& args, uint64_t element,
                                         const float (&values)[kCount]) {
  static_assert(kCount % 2 == 0);
  for (uint32_t i = 0; i < kCount; i += 2) {
    const float2 pair = {values[i], values[i + 1]};
    if (args.dtype == DType::kFp32) {
      *reinterpret_cast<float2*>(static_cast<float*>(args.out) + element + i) = pair;
    } else if (args.dtype == DType::kBf16) {
      *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(args.out) + element + i) =
          __float22bfloat162_rn(pair);
    } else {
      *reinterpret_cast<__half2*>(static_cast<__half*>(args.out) + element + i) =
          __float22half2_rn(pair);
    }
  }
}

__device__ __forceinline__ void StoreLse(const PagedArgs& args, const PagedRow& row, float largest,
                                         float sum) {
  args.lse[row.index] = sum > 0 ? (largest + log2f(sum)) * kLn2 : -INFINITY;
}

__device__ __forceinline__ float Inverse(float sum) { return sum > 0 ? 1 / sum : 0.0F; }

// Row of the part that holds the tile's packed row `row` of this chunk.
__device__ __forceinline__ uint64_t PartRow(const PagedWork& work, uint32_t chunk, uint32_t row) {
  return work.tile.first_part + uint64_t{work.head * work.tile.parts + chunk} * work.tile.rows +
         row;
}

// What a CTA writes of its work: the result where it has all keys, else its part of it.
class PagedOutput {
 public:
  __device__ PagedOutput(const PagedArgs& args, const PagedWork& work, float value_scale)
      : args_(args), work_(work), value_scale_(value_scale) {}

  // `largest` and `sum` as in PagedPlan::part_sums. Once for each row.
  __device__ void Sums(uint32_t row, float largest, float sum) const {
    if (work_.tile.parts == 1) {
      StoreLse(args_, PagedRow(args_, work_, row), largest, sum);
    } else {
      args_.plan.part_sums[PartRow(work_, work_.chunk, row)] = {largest, sum};
    }
  }
  // What a row's columns are multiplied with before Columns.
  __device__ float Factor(float sum) const {
    return work_.tile.parts == 1 ? value_scale_ * Inverse(sum) : value_scale_;
  }
  // Where a row's columns go, in elements: Columns' first argument.
  __device__ uint64_t Place(uint32_t row) const {
    return args_.sizes.value_dim * (work_.tile.parts == 1 ? PagedRow(args_, work_, row).index
                                                          : PartRow(work_, work_.chunk, row));
  }
  template <uint32_t kCount>
  __device__ void Columns(uint64_t place, const float (&values)[kCount]) const {
    if (work_.tile.parts == 1) {
      StoreOut(args_, place, values);
    } else {
      for (uint32_t i = 0; i < kCount; i += 2) {
        *reinterpret_cast<float2*>(args_.plan.part_rows + place + i) = {values[i], values[i + 1]};
      }
    }
  }

  // After all threads have written: the CTA that ends a tile's last part adds them up.
  __device__ void Finish() const {
    if (work_.tile.parts == 1) return;
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t* count = &args_.plan.contributions[work_.index * args_.sizes.kv_heads + work_.head];
      last = atomicAdd(count, 1) == work_.tile.parts - 1;
      if (last) *count = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    AddUp();
  }

 private:
  __device__ void AddUp() const {
    const uint32_t dim = args_.sizes.value_dim;
    const uint32_t units = dim / 4;
    for (uint32_t i = threadIdx.x; i < work_.tile.rows * units; i += blockDim.x) {
      const uint32_t r = i / units;
      const uint32_t column = i % units * 4;
      float largest = -INFINITY;
      float sum = 0;
      float4 total = {};
#pragma unroll 8
      for (uint32_t c = 0; c < work_.tile.parts; ++c) {
        const uint64_t part = PartRow(work_, c, r);
        const float2 sums = __ldcg(&args_.plan.part_sums[part]);
        const float4 values =
            __ldcg(reinterpret_cast<const float4*>(args_.plan.part_rows + part * dim + column));
        const float before = largest;
        largest = fmaxf(largest, sums.x);
        const float shrink = exp2f(before - Finite(largest));
        const float weight = exp2f(sums.x - Finite(largest));
        sum = sum * shrink + weight * sums.y;
        total.x = total.x * shrink + weight * values.x;
        total.y = total.y * shrink + weight * values.y;
        total.z = total.z * shrink + weight * values.z;
        total.w = total.w * shrink + weight * values.w;
      }
      const PagedRow row(args_, work_, r);
      const float inverse = Inverse(sum);
      const float values[4] = {total.x * inverse, total.y * inverse, total.z * inverse,
                               total.w * inverse};
      StoreOut(args_, row.index * dim + column, values);
      if (column == 0) StoreLse(args_, row, largest, sum);
    }
  }

  const PagedArgs& args_;
  const PagedWork& work_;
  float value_scale_;
};

}  // namespace kvrelay::attention::cuda
