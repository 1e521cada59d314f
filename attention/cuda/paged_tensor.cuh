// Paged attention on the tensor cores of any device from compute capability 8.0 on (mma.sync), K
// and V brought by cp.async some tiles ahead. A CTA has four warps. In a wide tile each has rows of
// its own and all keys; in a narrow one all have the same 16 rows, and a quarter of each tile's
// keys.
#pragma once

#include "attention/cuda/paged_keys.cuh"
#include "attention/cuda/paged_numbers.cuh"
#include "attention/cuda/paged_query.cuh"
#include "attention/cuda/paged_tensor.h"
#include "attention/cuda/ptx.h"

namespace kvrelay::attention::cuda {

inline constexpr uint32_t kTensorWarps = 4;
inline constexpr uint32_t kTensorThreads = 32 * kTensorWarps;

// Shared memory: the rows of Q, then the ring, in which the warps' sums of a narrow tile stand in
// the end. Two CTAs run on a device of 9.0, one on one of 8.6.
template <typename Numbers, uint32_t kDim>
struct TensorTile {
  static constexpr uint32_t kCtasPerSm = 2;
  static constexpr uint32_t kMostBytes = 96 * 1024;
  static constexpr uint32_t kKeyUnits = kDim * Numbers::kBytes / 16;
  using Keys = SharedRows<kKeyUnits>;
  using Query = SharedRows<kDim / 8>;

  // As many stages as there is room for, at most 8, in steps of `step`.
  static constexpr uint32_t Stages(uint32_t rows, uint32_t keys, uint32_t step) {
    const uint32_t room = (kMostBytes - rows * Query::kStride) / (keys * Keys::kStride);
    return (room < 8 ? room : 8) / step * step;
  }

  struct Wide {
    static constexpr uint32_t kRowTiles = kDim <= 128 ? 2 : 1;  // of 16, a warp's
    static constexpr uint32_t kRows = kTensorWarps * kRowTiles * 16;
    static constexpr uint32_t kKeys = 32;
    static constexpr uint32_t kStages = TensorTile::Stages(kRows, kKeys, 2);
    using Tiles = KeyTiles<kTensorWarps, kKeys, kKeyUnits, 2, kStages, 2>;
    static constexpr uint32_t kBytes = kRows * Query::kStride + kStages * Tiles::kTileBytes;
  };
  struct Narrow {
    static constexpr uint32_t kRows = 16;
    static constexpr uint32_t kWarpKeys = 16;
    static constexpr uint32_t kKeys = kTensorWarps * kWarpKeys;
    static constexpr uint32_t kStages = TensorTile::Stages(kRows, kKeys, 1);
    using Tiles = KeyTiles<kTensorWarps, kKeys, kKeyUnits, 2, kStages, 1>;
    static constexpr uint32_t kSumStride = kDim + 4;  // floats
    static constexpr uint32_t kRingBytes = kStages * Tiles::kTileBytes;
    static constexpr uint32_t kSumBytes = kTensorWarps * kRows * kSumStride * 4;
    static constexpr uint32_t kBytes =
        kRows * Query::kStride + (kRingBytes > kSumBytes ? kRingBytes : kSumBytes);
  };
  static constexpr uint32_t kBytes = Wide::kBytes > Narrow::kBytes ? Wide::kBytes : Narrow::kBytes;
};

template <typename Numbers, uint32_t kDim>
struct TensorShared {
  float query_scales[TensorTile<Numbers, kDim>::Wide::kRows];
  float2 sums[kTensorWarps][TensorTile<Numbers, kDim>::Narrow::kRows];
};

// A warp's part of a tile: kRowTiles times 16 rows from `row` on, kKeys keys of each tile of keys
// from `key` on. Operands are loaded one step before they are multiplied.
template <typename Numbers, uint32_t kDim, uint32_t kRowTiles, uint32_t kKeys>
class TensorWarp {
 public:
  using T = TensorTile<Numbers, kDim>;
  using Product = typename Numbers::Product;
  static constexpr uint32_t kKeyTiles = kKeys / 8;
  static constexpr uint32_t kPairs = kKeys / 16;
  static constexpr uint32_t kColumnTiles = kDim / 8;
  static constexpr uint32_t kRowsOfThread = 2 * kRowTiles;
  static constexpr uint32_t kScales = Numbers::kBytes == 2 ? 1 : kRowsOfThread;

  __device__ TensorWarp(const PagedArgs& args, const PagedWork& work, uint32_t query,
                        const float* query_scales, uint32_t row, uint32_t key)
      : args_(args),
        work_(work),
        logit_of_(args.layer,
                  args.sizes.scale * cuda::ScaleOf(args.layer.scales.k, args.layer.scales, work)),
        query_(query + QueryPlace(row)),
        row_(row),
        key_(key) {
    int32_t begin = 0;
    int32_t end = INT32_MAX;
#pragma unroll
    for (uint32_t i = 0; i < kRowsOfThread; ++i) {
      // Rows that there are not do as the last.
      const uint32_t r = min(Row(i), work.tile.rows - 1);
      const PagedRow paged(args, work, r);
      position_[i] = paged.position;
      float& scale = scale_[i % kScales];
      scale = Numbers::kBytes == 2 ? 1.0F : query_scales[r];
      if (logit_of_.plain()) scale *= logit_of_.scale();
      begin = max(begin, paged.begin);
      end = min(end, paged.end);
      largest_[i] = -INFINITY;
      sum_[i] = 0;
    }
    // All rows of the warp see [begin, end).
    all_begin_ = __reduce_max_sync(~0U, begin);
    all_end_ = min(__reduce_min_sync(~0U, end), static_cast<int32_t>(work.end));
  }

  // Row i of this thread's, in the tile.
  __device__ __forceinline__ uint32_t Row(uint32_t i) const {
    return row_ + i * 8 + threadIdx.x % 32 / 4;
  }

  // The logits' dot products with a tile of K that stands at `keys` in shared memory.
  using Logits = float[kRowTiles][kKeyTiles][4];
  __device__ __forceinline__ void Multiply(uint32_t keys, Logits& logits) const {
    uint32_t q[2][kRowTiles][4];
    uint32_t k[2][4];
    keys += KeyPlace();
    LoadQuery(0, q[0]);
    LoadKeys(keys, 0, 0, k[0]);
#pragma unroll
    for (uint32_t step = 0; step < kDim / 16; ++step) {
#pragma unroll
      for (uint32_t pair = 0; pair < kPairs; ++pair) {
        const uint32_t at = step * kPairs + pair;
        if (pair + 1 < kPairs) {
          LoadKeys(keys, step, pair + 1, k[(at + 1) % 2]);
        } else if (step + 1 < kDim / 16) {
          LoadKeys(keys, step + 1, 0, k[(at + 1) % 2]);
          LoadQuery(step + 1, q[(step + 1) % 2]);
        }
#pragma unroll
        for (uint32_t m = 0; m < kRowTiles; ++m) {
          ptx::Mma<Product>(logits[m][pair * 2], q[step % 2][m], k[at % 2][0], k[at % 2][1]);
          ptx::Mma<Product>(logits[m][pair * 2 + 1], q[step % 2][m], k[at % 2][2], k[at % 2][3]);
        }
      }
    }
  }

  // From dot products to weights; what was summed before shrinks where a larger logit comes.
  // `tile_first` is the position of the tile's first key.
  __device__ __forceinline__ void Weigh(uint32_t tile_first, Logits& logits) {
    const auto first = static_cast<int32_t>(tile_first + key_);
    const bool as_they_are =
        logit_of_.plain() && first >= all_begin_ && first + static_cast<int32_t>(kKeys) <= all_end_;
    if (!as_they_are) Change(first, logits);
#pragma unroll
    for (uint32_t i = 0; i < kRowsOfThread; ++i) {
      const uint32_t m = i / 2;
      const uint32_t low = i % 2 * 2;
      const float scale = as_they_are ? scale_[i % kScales] : 1;
      float highest = -INFINITY;
#pragma unroll
      for (uint32_t t = 0; t < kKeyTiles; ++t) {
        highest = fmaxf(highest, fmaxf(logits[m][t][low], logits[m][t][low + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(~0U, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0U, highest, 2));
      highest = fmaxf(highest * scale, largest_[i]);
      const float base = Finite(highest);
      const float shrink = ptx::Exp2(largest_[i] - base);
      largest_[i] = highest;
      float sum = 0;
#pragma unroll
      for (uint32_t t = 0; t < kKeyTiles; ++t) {
#pragma unroll
        for (uint32_t e = 0; e < 2; ++e) {
          float& logit = logits[m][t][low + e];
          logit = ptx::Exp2(fmaf(logit, scale, -base));
          sum += logit;
        }
      }
      sum_[i] = sum_[i] * shrink + sum;
      if (__any_sync(~0U, shrink != 1)) {
#pragma unroll
        for (uint32_t j = 0; j < kColumnTiles; ++j) {
          out_[m][j][low] *= shrink;
          out_[m][j][low + 1] *= shrink;
        }
      }
    }
  }

  // Adds the tile of V at `values`, weighed.
  __device__ __forceinline__ void AddUp(uint32_t values, const Logits& weights) {
    uint32_t v[2][4];
    values += ValuePlace();
    LoadValues(values, 0, 0, v[0]);
#pragma unroll
    for (uint32_t pair = 0; pair < kPairs; ++pair) {
      uint32_t p[kRowTiles][4];
#pragma unroll
      for (uint32_t m = 0; m < kRowTiles; ++m) {
        const float(&a)[4] = weights[m][pair * 2];
        const float(&b)[4] = weights[m][pair * 2 + 1];
        p[m][0] = ptx::Pack<Product>(a[0], a[1]);
        p[m][1] = ptx::Pack<Product>(a[2], a[3]);
        p[m][2] = ptx::Pack<Product>(b[0], b[1]);
        p[m][3] = ptx::Pack<Product>(b[2], b[3]);
      }
#pragma unroll
      for (uint32_t j = 0; j < kColumnTiles; j += 2) {
        const uint32_t at = (pair * kColumnTiles + j) / 2;
        if (j + 2 < kColumnTiles) {
          LoadValues(values, pair, j + 2, v[(at + 1) % 2]);
        } else if (pair + 1 < kPairs) {
          LoadValues(values, pair + 1, 0, v[(at + 1) % 2]);
        }
#pragma unroll
        for (uint32_t m = 0; m < kRowTiles; ++m) {
          ptx::Mma<Product>(out_[m][j], p[m], v[at % 2][0], v[at % 2][1]);
          ptx::Mma<Product>(out_[m][j + 1], p[m], v[at % 2][2], v[at % 2][3]);
        }
      }
    }
  }

  // After the last tile: each row's sum over the warp's keys.
  __device__ __forceinline__ void Close() {
#pragma unroll
    for (float& sum : sum_) {
      sum += __shfl_xor_sync(~0U, sum, 1);
      sum += __shfl_xor_sync(~0U, sum, 2);
    }
  }
  __device__ __forceinline__ float largest(uint32_t i) const { return largest_[i]; }
  __device__ __forceinline__ float sum(uint32_t i) const { return sum_[i]; }

  // Calls fn(column, values) for all columns that this thread has of its row i.
  template <typename Fn>
  __device__ __forceinline__ void Columns(uint32_t i, Fn&& fn) const {
    const uint32_t m = i / 2;
    const uint32_t low = i % 2 * 2;
    const uint32_t lane = threadIdx.x % 4;
#pragma unroll
    for (uint32_t j = 0; j < kColumnTiles; j += 2) {
      const float(&a)[4] = out_[m][j];
      const float(&b)[4] = out_[m][j + 1];
      if constexpr (Numbers::kBytes == 2) {
        fn(j * 8 + lane * 2, a[low], a[low + 1]);
        fn(j * 8 + 8 + lane * 2, b[low], b[low + 1]);
      } else {
        fn(j * 8 + lane * 4, a[low], b[low]);
        fn(j * 8 + lane * 4 + 2, a[low + 1], b[low + 1]);
      }
    }
  }

 private:
  // Where this lane's rows of operands begin, in Q, and in a tile of K and of V.
  __device__ static __forceinline__ uint32_t QueryPlace(uint32_t row) {
    const uint32_t lane = threadIdx.x % 32;
    return T::Query::Place(row + lane % 16, lane / 16);
  }
  __device__ __forceinline__ uint32_t KeyPlace() const {
    const uint32_t lane = threadIdx.x % 32;
    return Numbers::kBytes == 2 ? T::Keys::Place(key_ + lane / 16 * 8 + lane % 8, lane / 8 % 2)
                                : T::Keys::Place(key_ + lane % 16, 0);
  }
  __device__ __forceinline__ uint32_t ValuePlace() const {
    const uint32_t lane = threadIdx.x % 32;
    return T::Keys::Place(key_ + lane % 16, Numbers::kBytes == 2 ? lane / 16 : 0);
  }

  __device__ __forceinline__ void LoadQuery(uint32_t step, uint32_t (&q)[kRowTiles][4]) const {
#pragma unroll
    for (uint32_t m = 0; m < kRowTiles; ++m) {
      ptx::LoadMatrix(q[m], T::Query::Ahead(query_, step * 2) + m * (16 * T::Query::kStride));
    }
  }

  // 16 keys, 16 columns.
  __device__ __forceinline__ void LoadKeys(uint32_t keys, uint32_t step, uint32_t pair,
                                           uint32_t (&k)[4]) const {
    keys += pair * (16 * T::Keys::kStride);
    if constexpr (Numbers::kBytes == 2) {
      ptx::LoadMatrix(k, T::Keys::Ahead(keys, step * 2));
    } else {
      uint32_t packed[2];
      ptx::LoadMatrix(packed, T::Keys::Ahead(keys, step));
      k[0] = Numbers::template Halves<0, 1>(packed[0]);
      k[1] = Numbers::template Halves<2, 3>(packed[0]);
      k[2] = Numbers::template Halves<0, 1>(packed[1]);
      k[3] = Numbers::template Halves<2, 3>(packed[1]);
    }
  }
  __device__ __forceinline__ void LoadValues(uint32_t values, uint32_t pair, uint32_t j,
                                             uint32_t (&v)[4]) const {
    values += pair * (16 * T::Keys::kStride);
    if constexpr (Numbers::kBytes == 2) {
      ptx::LoadMatrixTransposed(v, T::Keys::Ahead(values, j));
    } else {
      uint32_t packed[2];
      ptx::LoadMatrixTransposed(packed, T::Keys::Ahead(values, j / 2));
      v[0] = Numbers::template Halves<0, 2>(packed[0]);
      v[1] = Numbers::template Halves<0, 2>(packed[1]);
      v[2] = Numbers::template Halves<1, 3>(packed[0]);
      v[3] = Numbers::template Halves<1, 3>(packed[1]);
    }
  }

  // Dot products to logits, where that is more than their scale.
  __device__ __forceinline__ void Change(int32_t first, Logits& logits) const {
    const bool plain = logit_of_.plain();
    const auto window = static_cast<int32_t>(args_.sizes.window);
#pragma unroll
    for (uint32_t i = 0; i < kRowsOfThread; ++i) {
      const int32_t end = min(position_[i] + 1, static_cast<int32_t>(work_.end));
      const int32_t begin = window == 0 ? 0 : position_[i] + 1 - window;
      float slope = 0;
      if (!plain) {
        const uint32_t row = min(Row(i), work_.tile.rows - 1);
        slope = logit_of_.Slope(PagedRow(args_, work_, row).query_head);
      }
#pragma unroll
      for (uint32_t t = 0; t < kKeyTiles; ++t) {
#pragma unroll
        for (uint32_t e = 0; e < 2; ++e) {
          float& logit = logits[i / 2][t][i % 2 * 2 + e];
          const int32_t at = first + static_cast<int32_t>(t * 8 + threadIdx.x % 4 * 2 + e);
          logit *= scale_[i % kScales];
          if (!plain) logit = logit_of_(logit, slope, at - position_[i]);
          if (at < begin || at >= end) logit = -INFINITY;
        }
      }
    }
  }

  const PagedArgs& args_;
  const PagedWork& work_;
  LogitOf logit_of_;
  uint32_t query_;
  uint32_t row_;
  uint32_t key_;
  int32_t all_begin_;
  int32_t all_end_;
  int32_t position_[kRowsOfThread];
  float scale_[kScales];
  float largest_[kRowsOfThread];
  float sum_[kRowsOfThread];
  float out_[kRowTiles][kColumnTiles][4] = {};
};

template <typename Numbers, uint32_t kDim>
__device__ __forceinline__ void AttendWide(const PagedArgs& args, const PagedWork& work,
                                           uint32_t query, const float* query_scales) {
  using T = typename TensorTile<Numbers, kDim>::Wide;
  typename T::Tiles tiles(args, work, query + T::kRows * TensorTile<Numbers, kDim>::Query::kStride);
  TensorWarp<Numbers, kDim, T::kRowTiles, T::kKeys> warp(args, work, query, query_scales,
                                                         threadIdx.x / 32 * T::kRowTiles * 16, 0);
#pragma unroll 1
  for (uint32_t tile = 0; tile < tiles.count(); ++tile) {
    const uint32_t at = tiles.Next();
    typename decltype(warp)::Logits logits = {};
    warp.Multiply(at, logits);
    warp.Weigh(work.begin + tile * T::kKeys, logits);
    warp.AddUp(at + T::Tiles::kTileBytes, logits);
  }
  tiles.Close();
  warp.Close();
  const PagedOutput output(
      args, work, ScaleOf(args.layer.scales.v, args.layer.scales, work) * Numbers::kFactor);
#pragma unroll
  for (uint32_t i = 0; i < 2 * T::kRowTiles; ++i) {
    const uint32_t row = warp.Row(i);
    if (row >= work.tile.rows) continue;
    if (threadIdx.x % 4 == 0) output.Sums(row, warp.largest(i), warp.sum(i));
    const float factor = output.Factor(warp.sum(i));
    const uint64_t place = output.Place(row);
    warp.Columns(i, [&](uint32_t column, float a, float b) {
      output.Columns(place + column, {a * factor, b * factor});
    });
  }
  output.Finish();
}

template <typename Numbers, uint32_t kDim>
__device__ __forceinline__ void AttendNarrow(const PagedArgs& args, const PagedWork& work,
                                             uint32_t query, float* all_sums,
                                             TensorShared<Numbers, kDim>& shared) {
  using T = typename TensorTile<Numbers, kDim>::Narrow;
  typename T::Tiles tiles(args, work, query + T::kRows * TensorTile<Numbers, kDim>::Query::kStride);
  const uint32_t w = threadIdx.x / 32;
  TensorWarp<Numbers, kDim, 1, T::kWarpKeys> warp(args, work, query, shared.query_scales, 0,
                                                  w * T::kWarpKeys);
#pragma unroll 1
  for (uint32_t tile = 0; tile < tiles.count(); ++tile) {
    typename decltype(warp)::Logits logits = {};
    warp.Multiply(tiles.Next(), logits);
    warp.Weigh(work.begin + tile * T::kKeys, logits);
    warp.AddUp(tiles.Next(), logits);
  }
  tiles.Close();
  warp.Close();
  __syncthreads();  // all have read the last keys, whose place the sums take
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i) {
    const uint32_t row = warp.Row(i);
    if (threadIdx.x % 4 == 0) shared.sums[w][row] = {warp.largest(i), warp.sum(i)};
    float* to = all_sums + (w * T::kRows + row) * T::kSumStride;
    warp.Columns(i, [&](uint32_t column, float a, float b) {
      *reinterpret_cast<float2*>(to + column) = {a, b};
    });
  }
  __syncthreads();
  const PagedOutput output(
      args, work, ScaleOf(args.layer.scales.v, args.layer.scales, work) * Numbers::kFactor);
  for (uint32_t i = threadIdx.x; i < work.tile.rows * (kDim / 4); i += kTensorThreads) {
    const uint32_t row = i / (kDim / 4);
    const uint32_t column = i % (kDim / 4) * 4;
    float largest = -INFINITY;
    for (uint32_t from = 0; from < kTensorWarps; ++from) {
      largest = fmaxf(largest, shared.sums[from][row].x);
    }
    float sum = 0;
    float values[4] = {};
    for (uint32_t from = 0; from < kTensorWarps; ++from) {
      const float2 sums = shared.sums[from][row];
      const float weight = ptx::Exp2(sums.x - Finite(largest));
      const float4 part = *reinterpret_cast<const float4*>(
          all_sums + (from * T::kRows + row) * T::kSumStride + column);
      sum += weight * sums.y;
      values[0] += weight * part.x;
      values[1] += weight * part.y;
      values[2] += weight * part.z;
      values[3] += weight * part.w;
    }
    if (column == 0) output.Sums(row, largest, sum);
    const float factor = output.Factor(sum);
    for (float& value : values) value *= factor;
    output.Columns(output.Place(row) + column, values);
  }
  output.Finish();
}

template <typename Numbers, uint32_t kDim>
__global__ void __launch_bounds__(kTensorThreads, TensorTile<Numbers, kDim>::kCtasPerSm)
    AttendTensor(const PagedArgs args) {
  using T = TensorTile<Numbers, kDim>;
  extern __shared__ __align__(128) uint4 memory[];
  __shared__ TensorShared<Numbers, kDim> shared;
  const uint32_t query = ptx::SharedAddress(memory);
  ForEachItem(args, [&](const PagedWork& work) {
    if (work.tile.rows <= T::Narrow::kRows) {
      constexpr uint32_t kRows = T::Narrow::kRows;
      StageQueryFor<Numbers, kDim, kRows>(args, work, query, shared.query_scales);
      float* sums = reinterpret_cast<float*>(memory) + kRows * T::Query::kStride / 4;
      AttendNarrow<Numbers, kDim>(args, work, query, sums, shared);
    } else {
      StageQueryFor<Numbers, kDim, T::Wide::kRows>(args, work, query, shared.query_scales);
      AttendWide<Numbers, kDim>(args, work, query, shared.query_scales);
    }
  });
}

template <typename Numbers, uint32_t kDim>
cudaError_t LaunchTensor(const PagedArgs& args, cudaStream_t stream) {
  constexpr auto kKernel = AttendTensor<Numbers, kDim>;
  constexpr uint32_t kBytes = TensorTile<Numbers, kDim>::kBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kKernel<<<args.sizes.ctas, kTensorThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename Numbers, uint32_t kDim>
PagedKernel TensorKernelOf() {
  using T = TensorTile<Numbers, kDim>;
  return {{T::Narrow::kRows, T::Wide::kRows},
          T::kCtasPerSm,
          T::kBytes + uint32_t{sizeof(TensorShared<Numbers, kDim>)} + 64,
          LaunchTensor<Numbers, kDim>};
}

template <uint32_t kDim>
std::optional<PagedKernel> TensorKernelFor(DType dtype, DType cache_dtype) {
  if (dtype == DType::kFp32) return std::nullopt;
  switch (cache_dtype) {
    case DType::kFp8E4m3:
      return TensorKernelOf<E4m3Numbers, kDim>();
    case DType::kFp8E5m2:
      return TensorKernelOf<E5m2Numbers, kDim>();
    case DType::kInt8:
      return TensorKernelOf<Int8Numbers, kDim>();
    default:
      break;
  }
  if (dtype != cache_dtype) return std::nullopt;
  return dtype == DType::kBf16 ? TensorKernelOf<Bf16Numbers, kDim>()
                               : TensorKernelOf<Fp16Numbers, kDim>();
}

}  // namespace kvrelay::attention::cuda
