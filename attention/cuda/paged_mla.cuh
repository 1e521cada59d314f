// Paged attention over MLA's latent rows (576 columns of which V is the first 512) on tensor cores,
// absorbed queries. A row is brought once and serves as K and V. Eight warps: for the logits they
// share out rows, keys and, with few rows, columns; for the sums rows and columns.
#pragma once

#include "attention/cuda/paged_keys.cuh"
#include "attention/cuda/paged_query.cuh"
#include "attention/cuda/paged_tensor.h"
#include "attention/cuda/ptx.h"
#include "attention/cuda/ptx_mma.h"

namespace kvrelay::attention::cuda {

inline constexpr uint32_t kLatentColumns = 576;
inline constexpr uint32_t kLatentValues = 512;
inline constexpr uint32_t kMlaWarps = 8;
inline constexpr uint32_t kMlaThreads = 32 * kMlaWarps;
inline constexpr uint32_t kMlaKeys = 32;  // of a tile

template <uint32_t kRows>
struct MlaTile {
  using Rows = SharedRows<kLatentColumns / 8>;
  static constexpr uint32_t kRowGroups = kRows / 16;
  static constexpr uint32_t kKeyGroups = kMlaKeys / 16;
  static constexpr uint32_t kSplits = kMlaWarps / (kRowGroups * kKeyGroups);  // of K's columns
  static constexpr uint32_t kSteps = kLatentColumns / 16 / kSplits;
  static constexpr uint32_t kColumns = kLatentValues * kRowGroups / kMlaWarps;  // of a warp's sums
  static constexpr uint32_t kCtasPerSm = kRows == 16 ? 2 : 1;
  static constexpr uint32_t kStages = 2;
  static constexpr uint32_t kQueryBytes = kRows * Rows::kStride;
  using Keys = KeyTiles<kMlaWarps, kMlaKeys, kLatentColumns / 8, 1, kStages, 1>;
  static constexpr uint32_t kScoreStride = kMlaKeys + 8;  // floats; no bank conflicts
  static constexpr uint32_t kScoreBytes = kSplits * kRows * kScoreStride * 4;
  static constexpr uint32_t kBytes = kQueryBytes + kStages * Keys::kTileBytes + kScoreBytes;
};

template <typename Product, uint32_t kRows>
class MlaWarp {
 public:
  using T = MlaTile<kRows>;

  __device__ MlaWarp(const PagedArgs& args, const PagedWork& work, uint32_t query, uint32_t ring,
                     float* scores)
      : args_(args),
        work_(work),
        logit_of_(args.layer,
                  args.sizes.scale * ScaleOf(args.layer.scales.k, args.layer.scales, work)),
        query_(query),
        ring_(ring),
        scores_(scores),
        row_(threadIdx.x / 32 % T::kRowGroups * 16),
        share_(threadIdx.x / 32 / T::kRowGroups) {
    int32_t begin = 0;
    int32_t end = INT32_MAX;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const PagedRow row(args, work, min(Row(i), work.tile.rows - 1));
      position_[i] = row.position;
      slope_[i] = logit_of_.Slope(row.query_head);
      begin = max(begin, row.begin);
      end = min(end, row.end);
    }
    // All rows of the warp see [begin, end).
    all_begin_ = __reduce_max_sync(~0U, begin);
    all_end_ = min(__reduce_min_sync(~0U, end), static_cast<int32_t>(work.end));
  }

  __device__ __forceinline__ void Run() {
    StageQuery<kLatentColumns, kRows>(args_, work_, query_);
    typename T::Keys keys(args_, work_, ring_);
#pragma unroll 1
    for (uint32_t tile = 0; tile < keys.count(); ++tile) {
      const uint32_t at = keys.Next();
      Multiply(at);
      __syncthreads();
      Weigh(static_cast<int32_t>(work_.begin + tile * kMlaKeys));
      AddUp(at);
    }
    keys.Close();
#pragma unroll
    for (float& sum : sum_) {
      sum += __shfl_xor_sync(~0U, sum, 1);
      sum += __shfl_xor_sync(~0U, sum, 2);
    }
    Write();
  }

 private:
  static constexpr uint32_t kUnits = kLatentColumns / 8;

  __device__ __forceinline__ uint32_t Row(uint32_t i) const {
    return row_ + i * 8 + threadIdx.x % 32 / 4;
  }

  // This warp's part of the dot products: 16 rows, 16 keys, a share of the columns.
  __device__ __forceinline__ void Multiply(uint32_t keys) const {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t group = share_ % T::kKeyGroups;
    const uint32_t split = share_ / T::kKeyGroups;
    // Sums of even and of odd steps, each operand loaded two steps before it is multiplied.
    float dots[2][2][4] = {};
    uint32_t q[3][4];
    uint32_t k[3][4];
    const uint32_t first = split * T::kSteps * 2;
    const uint32_t q_at = query_ + T::Rows::Place(row_ + lane % 16, lane / 16);
    const uint32_t k_at =
        keys + T::Rows::Place(group * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const auto load = [&](uint32_t s) {
      ptx::LoadMatrix(q[s % 3], T::Rows::Ahead(q_at, first + s * 2));
      ptx::LoadMatrix(k[s % 3], T::Rows::Ahead(k_at, first + s * 2));
    };
    load(0);
    load(1);
#pragma unroll
    for (uint32_t s = 0; s < T::kSteps; ++s) {
      if (s + 2 < T::kSteps) load(s + 2);
      ptx::Mma<Product>(dots[s % 2][0], q[s % 3], k[s % 3][0], k[s % 3][1]);
      ptx::Mma<Product>(dots[s % 2][1], q[s % 3], k[s % 3][2], k[s % 3][3]);
    }
    float* to = scores_ + split * kRows * T::kScoreStride + group * 16 + lane % 4 * 2;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
#pragma unroll
      for (uint32_t t = 0; t < 2; ++t) {
        *reinterpret_cast<float2*>(to + Row(i) * T::kScoreStride + t * 8) = {
            dots[0][t][i * 2] + dots[1][t][i * 2], dots[0][t][i * 2 + 1] + dots[1][t][i * 2 + 1]};
      }
    }
  }

  // From all warps' dot products to this warp's rows' weights, which all warps of these rows make
  // alike.
  __device__ __forceinline__ void Weigh(int32_t first) {
    const bool as_they_are = logit_of_.plain() && first >= all_begin_ &&
                             first + static_cast<int32_t>(kMlaKeys) <= all_end_;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      float logits[kMlaKeys / 4] = {};
      const float* from = scores_ + Row(i) * T::kScoreStride + threadIdx.x % 4 * 2;
#pragma unroll
      for (uint32_t split = 0; split < T::kSplits; ++split) {
#pragma unroll
        for (uint32_t t = 0; t < kMlaKeys / 8; ++t) {
          const float2 part =
              *reinterpret_cast<const float2*>(from + split * (kRows * T::kScoreStride) + t * 8);
          logits[t * 2] += part.x;
          logits[t * 2 + 1] += part.y;
        }
      }
      if (!as_they_are) Change(i, first, logits);
      const float scale = as_they_are ? logit_of_.scale() : 1;
      float highest = -INFINITY;
#pragma unroll
      for (const float logit : logits) highest = fmaxf(highest, logit);
      highest = fmaxf(highest, __shfl_xor_sync(~0U, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0U, highest, 2));
      highest = fmaxf(highest * scale, largest_[i]);
      const float base = Finite(highest);
      const float shrink = ptx::Exp2(largest_[i] - base);
      largest_[i] = highest;
      float sum = 0;
#pragma unroll
      for (float& logit : logits) {
        logit = ptx::Exp2(fmaf(logit, scale, -base));
        sum += logit;
      }
      sum_[i] = sum_[i] * shrink + sum;
#pragma unroll
      for (uint32_t t = 0; t < kMlaKeys / 8; ++t) {
        weights_[t / 2][t % 2 * 2 + i] = ptx::Pack<Product>(logits[t * 2], logits[t * 2 + 1]);
      }
      if (__any_sync(~0U, shrink != 1)) {
#pragma unroll
        for (float(&out)[4] : out_) {
          out[i * 2] *= shrink;
          out[i * 2 + 1] *= shrink;
        }
      }
    }
  }
  // Dot products to logits, where that is more than their scale.
  __device__ __forceinline__ void Change(uint32_t i, int32_t first,
                                         float (&logits)[kMlaKeys / 4]) const {
    const auto window = static_cast<int32_t>(args_.sizes.window);
    const int32_t end = min(position_[i] + 1, static_cast<int32_t>(work_.end));
    const int32_t begin = window == 0 ? 0 : position_[i] + 1 - window;
#pragma unroll
    for (uint32_t j = 0; j < kMlaKeys / 4; ++j) {
      const auto at = first + static_cast<int32_t>(j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2);
      logits[j] = logit_of_(logits[j], slope_[i], at - position_[i]);
      if (at < begin || at >= end) logits[j] = -INFINITY;
    }
  }

  __device__ __forceinline__ void AddUp(uint32_t keys) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t unit = share_ * (T::kColumns / 8);
    constexpr uint32_t kPairs = T::kColumns / 16;
    constexpr uint32_t kLoads = kMlaKeys / 16 * kPairs;
    uint32_t v[3][4];
    const uint32_t v_at = T::Rows::Ahead(keys + T::Rows::Place(lane % 16, lane / 16), unit);
    const auto load = [&](uint32_t i) {
      ptx::LoadMatrixTransposed(
          v[i % 3], T::Rows::Ahead(v_at, i % kPairs * 2) + i / kPairs * (16 * T::Rows::kStride));
    };
    load(0);
    load(1);
#pragma unroll
    for (uint32_t i = 0; i < kLoads; ++i) {
      if (i + 2 < kLoads) load(i + 2);
      const uint32_t j = i % kPairs * 2;
      ptx::Mma<Product>(out_[j], weights_[i / kPairs], v[i % 3][0], v[i % 3][1]);
      ptx::Mma<Product>(out_[j + 1], weights_[i / kPairs], v[i % 3][2], v[i % 3][3]);
    }
  }

  __device__ __forceinline__ void Write() const {
    const PagedOutput output(args_, work_,
                             ScaleOf(args_.layer.scales.v, args_.layer.scales, work_));
    const uint32_t lane = threadIdx.x % 4;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      if (Row(i) >= work_.tile.rows) continue;
      if (share_ == 0 && lane == 0) output.Sums(Row(i), largest_[i], sum_[i]);
      const float factor = output.Factor(sum_[i]);
      const uint64_t place = output.Place(Row(i)) + share_ * T::kColumns + lane * 2;
#pragma unroll
      for (uint32_t j = 0; j < T::kColumns / 8; ++j) {
        output.Columns(place + j * 8, {out_[j][i * 2] * factor, out_[j][i * 2 + 1] * factor});
      }
    }
    output.Finish();
  }

  const PagedArgs& args_;
  const PagedWork& work_;
  LogitOf logit_of_;
  uint32_t query_;
  uint32_t ring_;
  float* scores_;
  uint32_t row_;    // the warp's first
  uint32_t share_;  // of what there is to do for its rows
  int32_t all_begin_;
  int32_t all_end_;
  int32_t position_[2];
  float slope_[2];
  float largest_[2] = {-INFINITY, -INFINITY};
  float sum_[2] = {};
  uint32_t weights_[kMlaKeys / 16][4];
  float out_[T::kColumns / 8][4] = {};
};

template <typename Product, uint32_t kRows>
__global__ void __launch_bounds__(kMlaThreads, MlaTile<kRows>::kCtasPerSm)
    AttendMla(const PagedArgs args) {
  using T = MlaTile<kRows>;
  extern __shared__ __align__(128) uint4 memory[];
  const uint32_t query = ptx::SharedAddress(memory);
  float* scores = reinterpret_cast<float*>(memory) + (T::kBytes - T::kScoreBytes) / 4;
  ForEachItem(args, [&](const PagedWork& work) {
    MlaWarp<Product, kRows>(args, work, query, query + T::kQueryBytes, scores).Run();
  });
}

template <typename Product, uint32_t kRows>
cudaError_t LaunchMla(const PagedArgs& args, cudaStream_t stream) {
  constexpr auto kKernel = AttendMla<Product, kRows>;
  constexpr uint32_t kBytes = MlaTile<kRows>::kBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kKernel<<<args.sizes.ctas, kMlaThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename Product, uint32_t kRows>
PagedKernel MlaKernelOf() {
  using T = MlaTile<kRows>;
  return {{kRows, kRows}, T::kCtasPerSm, T::kBytes, LaunchMla<Product, kRows>};
}

}  // namespace kvrelay::attention::cuda
