// Paged attention of every shape, on CUDA cores in fp32: 16 rows a CTA, 8 threads a row, keys in
// tiles that are widened on their way to shared memory.
#include "attention/cuda/paged_device.cuh"
#include "kvcache/convert.h"

namespace kvrelay::attention::cuda {
namespace {

constexpr uint32_t kRows = 16;
constexpr uint32_t kLanes = 8;  // of a row
constexpr uint32_t kThreads = kRows * kLanes;

// Tile sizes by the number of columns that there is room for.
template <uint32_t kColumns>
struct Tile {
  static constexpr uint32_t kKeys = kColumns <= 256 ? 32 : 16;
  static constexpr uint32_t kStride = kColumns + 4;  // floats; no bank conflicts
  static constexpr uint32_t kBytes = (kRows + kKeys) * kStride * 4 + kRows * kKeys * 4;
};

// Eight numbers, widened. `from` is aligned to 8 bytes.
template <typename Number>
__device__ void WidenEight(const std::byte* from, float* to) {
  using Bits = typename Number::Bits;
  uint64_t words[sizeof(Bits)];
  for (uint32_t i = 0; i < sizeof(Bits); ++i) {
    words[i] = reinterpret_cast<const uint64_t*>(from)[i];
  }
  constexpr uint32_t kPerWord = 8 / sizeof(Bits);
  for (uint32_t i = 0; i < 8; ++i) {
    to[i] = Number::ToFloat(
        static_cast<Bits>(words[i / kPerWord] >> (i % kPerWord * 8 * sizeof(Bits))));
  }
}

__device__ void WidenEight(DType dtype, const std::byte* from, float* to) {
  switch (dtype) {
    case DType::kFp32:
      return WidenEight<Fp32>(from, to);
    case DType::kFp16:
      return WidenEight<Fp16>(from, to);
    case DType::kBf16:
      return WidenEight<Bf16>(from, to);
    case DType::kFp8E4m3:
      return WidenEight<Fp8E4m3>(from, to);
    case DType::kFp8E5m2:
      return WidenEight<Fp8E5m2>(from, to);
    case DType::kInt8:
      return WidenEight<Int8>(from, to);
  }
}

__device__ uint32_t BytesOf(DType dtype) {
  return dtype == DType::kFp32 ? 4 : (dtype == DType::kFp16 || dtype == DType::kBf16) ? 2 : 1;
}

// Rows of `columns` numbers into shared memory: row r from source(r), null: zeros.
template <typename Source>
__device__ void WidenRows(DType dtype, uint32_t rows, uint32_t columns, float* to, uint32_t stride,
                          Source&& source) {
  const uint32_t units = columns / 8;
  for (uint32_t i = threadIdx.x; i < rows * units; i += kThreads) {
    const uint32_t row = i / units;
    const uint32_t column = i % units * 8;
    const std::byte* from = source(row);
    alignas(16) float values[8] = {};
    if (from != nullptr) WidenEight(dtype, from + column * BytesOf(dtype), values);
    auto* out = reinterpret_cast<float4*>(to + row * stride + column);
    out[0] = reinterpret_cast<const float4*>(values)[0];
    out[1] = reinterpret_cast<const float4*>(values)[1];
  }
}

template <uint32_t kColumns>
__device__ void General(const PagedArgs& args, const PagedWork& work, float* shared) {
  using T = Tile<kColumns>;
  float* const query = shared;
  float* const keys = query + kRows * T::kStride;  // K's tile, then V's
  float* const weights = keys + T::kKeys * T::kStride;
  const PagedSizes& sizes = args.sizes;
  const LayerCache& cache = args.layer.cache;
  const LayerScales& scales = args.layer.scales;
  const uint32_t r = threadIdx.x / kLanes;
  const uint32_t lane = threadIdx.x % kLanes;
  const PagedRow row(args, work, min(r, work.tile.rows - 1));
  const LogitOf logit_of(args.layer, sizes.scale * ScaleOf(scales.k, scales, work));
  const float slope = logit_of.Slope(row.query_head);

  WidenRows(args.dtype, kRows, sizes.head_dim, query, T::kStride, [&](uint32_t i) {
    const uint64_t row_bytes = uint64_t{sizes.head_dim} * BytesOf(args.dtype);
    return i >= work.tile.rows
               ? nullptr
               : static_cast<const std::byte*>(args.q) + PagedRow(args, work, i).index * row_bytes;
  });
  const auto load = [&](const void* tensor, uint32_t columns, uint32_t first) {
    __syncthreads();
    WidenRows(args.cache_dtype, T::kKeys, columns, keys, T::kStride, [&](uint32_t i) {
      return first + i >= work.end
                 ? nullptr
                 : static_cast<const std::byte*>(tensor) + KeyOffset(args, work, first + i);
    });
    __syncthreads();
  };

  float out[kColumns / kLanes] = {};  // columns 4 * lane and the next three, from every 32 on
  float largest = -INFINITY;
  float sum = 0;
  for (uint32_t first = work.begin; first < work.end; first += T::kKeys) {
    load(cache.k, sizes.head_dim, first);
    float logits[T::kKeys / kLanes];
    float highest = largest;
    for (uint32_t j = 0; j < T::kKeys / kLanes; ++j) {
      const uint32_t key = lane + j * kLanes;
      float dot = 0;
      for (uint32_t d = 0; d < sizes.head_dim; d += 4) {
        const float4 a = *reinterpret_cast<const float4*>(query + r * T::kStride + d);
        const float4 b = *reinterpret_cast<const float4*>(keys + key * T::kStride + d);
        dot += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
      }
      const auto at = static_cast<int32_t>(first + key);
      const bool sees = at >= row.begin && at < row.end && first + key < work.end;
      logits[j] = sees ? logit_of(dot, slope, at - row.position) : -INFINITY;
      highest = fmaxf(highest, logits[j]);
    }
    for (uint32_t distance = 1; distance < kLanes; distance *= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(~0U, highest, distance));
    }
    const float shrink = exp2f(largest - Finite(highest));
    largest = highest;
    sum *= shrink;
    for (float& x : out) x *= shrink;
    for (uint32_t j = 0; j < T::kKeys / kLanes; ++j) {
      const float weight = exp2f(logits[j] - Finite(largest));
      sum += weight;
      weights[r * T::kKeys + lane + j * kLanes] = weight;
    }
    if (cache.v != nullptr) {
      load(cache.v, sizes.value_dim, first);
    } else {
      __syncwarp();
    }
    for (uint32_t key = 0; key < T::kKeys; ++key) {
      const float weight = weights[r * T::kKeys + key];
#pragma unroll
      for (uint32_t c = 0; c < kColumns / kLanes; c += 4) {
        const uint32_t column = lane * 4 + c * kLanes;
        if (column < sizes.value_dim) {
          const float4 v = *reinterpret_cast<const float4*>(keys + key * T::kStride + column);
          out[c] += weight * v.x;
          out[c + 1] += weight * v.y;
          out[c + 2] += weight * v.z;
          out[c + 3] += weight * v.w;
        }
      }
    }
  }
  for (uint32_t distance = 1; distance < kLanes; distance *= 2) {
    sum += __shfl_xor_sync(~0U, sum, distance);
  }

  const PagedOutput output(args, work, ScaleOf(scales.v, scales, work));
  if (r < work.tile.rows) {
    if (lane == 0) output.Sums(r, largest, sum);
    const float factor = output.Factor(sum);
    const uint64_t place = output.Place(r);
#pragma unroll
    for (uint32_t c = 0; c < kColumns / kLanes; c += 4) {
      const uint32_t column = lane * 4 + c * kLanes;
      if (column < sizes.value_dim) {
        const float values[4] = {out[c] * factor, out[c + 1] * factor, out[c + 2] * factor,
                                 out[c + 3] * factor};
        output.Columns(place + column, values);
      }
    }
  }
  output.Finish();
}

template <uint32_t kColumns>
__global__ void __launch_bounds__(kThreads) AttendGeneral(const PagedArgs args) {
  extern __shared__ float4 shared[];
  ForEachItem(args, [&](const PagedWork& work) {
    General<kColumns>(args, work, reinterpret_cast<float*>(shared));
  });
}

template <uint32_t kColumns>
cudaError_t Launch(const PagedArgs& args, cudaStream_t stream) {
  constexpr auto kKernel = AttendGeneral<kColumns>;
  const cudaError_t error = cudaFuncSetAttribute(
      kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile<kColumns>::kBytes);
  if (error != cudaSuccess) return error;
  kKernel<<<args.sizes.ctas, kThreads, Tile<kColumns>::kBytes, stream>>>(args);
  return cudaGetLastError();
}

template <uint32_t kColumns>
PagedKernel KernelOf(uint32_t ctas_per_sm) {
  return {{kRows, kRows}, ctas_per_sm, Tile<kColumns>::kBytes, Launch<kColumns>};
}

}  // namespace

PagedKernel GeneralKernel(const PagedShape& shape) {
  if (shape.head_dim <= 128) return KernelOf<128>(4);
  if (shape.head_dim <= 256) return KernelOf<256>(2);
  return KernelOf<576>(2);
}

}  // namespace kvrelay::attention::cuda
