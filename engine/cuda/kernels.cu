#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <string>

#include "engine/cuda/kernels.h"
#include "kvcache/cuda/cuda_status.h"

namespace kvrelay::engine::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / 32;

__device__ float Widen(float x) { return x; }
__device__ float Widen(__half x) { return __half2float(x); }
__device__ float Widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T NarrowTo(float x);
template <>
__device__ float NarrowTo<float>(float x) {
  return x;
}
template <>
__device__ __half NarrowTo<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __nv_bfloat16 NarrowTo<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ float WarpSum(float x) {
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
  return x;
}

// The sum over all threads of the block, for all of them.
__device__ float BlockSum(float x) {
  __shared__ float parts[kWarps];
  x = WarpSum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  return WarpSum(threadIdx.x % 32 < kWarps ? parts[threadIdx.x % 32] : 0.0F);
}

template <typename T>
__global__ void NarrowKernel(const float* in, size_t count, T* out) {
  const size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) out[i] = NarrowTo<T>(in[i]);
}

template <typename T>
__global__ void EmbedKernel(const T* embedding, const uint32_t* tokens, uint32_t hidden, float* x) {
  const T* from = embedding + size_t{tokens[blockIdx.x]} * hidden;
  float* to = x + size_t{blockIdx.x} * hidden;
  for (uint32_t i = threadIdx.x; i < hidden; i += kThreads) to[i] = Widen(from[i]);
}

template <typename T>
__global__ void RmsNormKernel(const float* x, const uint32_t* rows_of, const float* weight,
                              float eps, uint32_t hidden, T* out) {
  const size_t row = rows_of == nullptr ? blockIdx.x : rows_of[blockIdx.x];
  const float* from = x + row * hidden;
  float squares = 0;
  for (uint32_t i = threadIdx.x; i < hidden; i += kThreads) squares += from[i] * from[i];
  const float scale = 1.0F / sqrtf(BlockSum(squares) / static_cast<float>(hidden) + eps);
  T* to = out + size_t{blockIdx.x} * hidden;
  for (uint32_t i = threadIdx.x; i < hidden; i += kThreads) {
    to[i] = NarrowTo<T>(weight[i] * (from[i] * scale));
  }
}

// A warp for each head of a row.
template <typename T, typename C>
__global__ void SplitAndStoreKernel(SplitQkv args) {
  const uint32_t row = blockIdx.x;
  const uint32_t heads = args.query_heads + 2 * args.kv_heads;
  const uint32_t head = blockIdx.y * kWarps + threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32;
  if (head >= heads) return;
  const bool is_q = head < args.query_heads;
  const bool is_v = head >= args.query_heads + args.kv_heads;
  const uint32_t dim = args.head_dim;
  const uint32_t half = dim / 2;
  const T* from = static_cast<const T*>(args.qkv) + (size_t{row} * heads + head) * dim;
  const float* bias = args.bias == nullptr ? nullptr : args.bias + size_t{head} * dim;
  const auto value = [&](uint32_t i) { return Widen(from[i]) + (bias == nullptr ? 0 : bias[i]); };

  const float* norm = is_v ? nullptr : is_q ? args.q_norm : args.k_norm;
  float scale = 1;
  if (norm != nullptr) {
    float squares = 0;
    for (uint32_t i = lane; i < dim; i += 32) squares += value(i) * value(i);
    scale = 1.0F / sqrtf(WarpSum(squares) / static_cast<float>(dim) + args.eps);
  }
  const auto normed = [&](uint32_t i) {
    return norm == nullptr ? value(i) : norm[i] * (value(i) * scale);
  };

  T* q = nullptr;
  C* cached = nullptr;
  const uint32_t position = args.positions[row];
  if (is_q) {
    q = static_cast<T*>(args.q) + (size_t{row} * args.query_heads + head) * dim;
  } else {
    const BlockId block = args.blocks[row];
    if (block == kNoBlock) return;
    const CacheLayer& cache = args.cache;
    const uint32_t kv_head = head - args.query_heads - (is_v ? args.kv_heads : 0);
    cached = reinterpret_cast<C*>((is_v ? cache.v : cache.k) + block * cache.block_stride +
                                  kv_head * cache.head_stride +
                                  position % cache.block_size * cache.token_stride);
  }
  const auto store = [&](uint32_t i, float x) {
    if (is_q) {
      q[i] = NarrowTo<T>(x);
    } else {
      cached[i] = NarrowTo<C>(x);
    }
  };
  for (uint32_t i = lane; i < half; i += 32) {
    const float a = normed(i);
    const float b = normed(i + half);
    float sin = 0;
    float cos = 1;
    if (!is_v) sincosf(static_cast<float>(position) * args.inverse_frequencies[i], &sin, &cos);
    store(i, a * cos - b * sin);
    store(i + half, b * cos + a * sin);
  }
}

template <typename T>
__global__ void SwiGluKernel(const T* gate_up, const float* bias, uint32_t width, T* out) {
  const uint32_t i = blockIdx.y * kThreads + threadIdx.x;
  if (i >= width) return;
  const T* from = gate_up + size_t{blockIdx.x} * 2 * width;
  const float gate = Widen(from[i]) + (bias == nullptr ? 0 : bias[i]);
  const float up = Widen(from[width + i]) + (bias == nullptr ? 0 : bias[width + i]);
  out[size_t{blockIdx.x} * width + i] = NarrowTo<T>(gate / (1.0F + expf(-gate)) * up);
}

__global__ void AddBiasKernel(const float* bias, uint32_t width, float* x) {
  const uint32_t i = blockIdx.y * kThreads + threadIdx.x;
  if (i < width) x[size_t{blockIdx.x} * width + i] += bias[i];
}

__global__ void AddPartsKernel(Parts parts, size_t count, float* x) {
  const size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  float sum = parts.of_rank[0][i];
  for (uint32_t rank = 1; rank < parts.ranks; ++rank) sum += parts.of_rank[rank][i];
  x[i] += sum;
}

// Whether `a` comes before `b`.
__device__ bool Before(const ScoredToken& a, const ScoredToken& b) {
  if (isnan(a.logit) != isnan(b.logit)) return isnan(b.logit);
  if (isnan(a.logit) || a.logit == b.logit) return a.id < b.id;
  return a.logit > b.logit;
}

__device__ ScoredToken FirstOfWarp(ScoredToken best) {
  for (int lane = 16; lane > 0; lane /= 2) {
    const ScoredToken other = {__shfl_xor_sync(0xffffffff, best.logit, lane),
                               __shfl_xor_sync(0xffffffff, best.id, lane)};
    if (Before(other, best)) best = other;
  }
  return best;
}

__global__ void LikeliestKernel(const float* logits, uint32_t width, uint32_t first_id,
                                ScoredToken* out) {
  __shared__ float scores[kWarps];
  __shared__ uint32_t ids[kWarps];
  const float* row = logits + size_t{blockIdx.x} * width;
  const ScoredToken none = {NAN, 0xffffffff};
  ScoredToken best = none;
  for (uint32_t i = threadIdx.x; i < width; i += kThreads) {
    const ScoredToken next = {row[i], first_id + i};
    if (Before(next, best)) best = next;
  }
  best = FirstOfWarp(best);
  const uint32_t warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
    scores[warp] = best.logit;
    ids[warp] = best.id;
  }
  __syncthreads();
  if (warp > 0) return;
  best = threadIdx.x < kWarps ? ScoredToken{scores[threadIdx.x], ids[threadIdx.x]} : none;
  best = FirstOfWarp(best);
  if (threadIdx.x == 0) out[blockIdx.x] = best;
}

uint32_t Blocks(size_t count) { return static_cast<uint32_t>((count + kThreads - 1) / kThreads); }

Status Launched(const char* kernel) {
  return kvrelay::cuda::CudaStatus(cudaGetLastError(), kernel);
}

// What `launch` of a value of the type returns.
template <typename Launch>
Status WithType(DType dtype, Launch launch) {
  switch (dtype) {
    case DType::kFp32:
      return launch(float());
    case DType::kFp16:
      return launch(__half());
    case DType::kBf16:
      return launch(__nv_bfloat16());
    default:
      return {Code::kInternal, "no kernels for " + std::string(DTypeName(dtype))};
  }
}

}  // namespace

Status Narrow(DType dtype, const float* in, size_t count, void* out, cudaStream_t stream) {
  if (count == 0) return Status::Ok();
  return WithType(dtype, [&]<typename T>(T) {
    NarrowKernel<<<Blocks(count), kThreads, 0, stream>>>(in, count, static_cast<T*>(out));
    return Launched("narrowing");
  });
}

Status Embed(DType dtype, const void* embedding, const uint32_t* tokens, uint32_t rows,
             uint32_t hidden, float* x, cudaStream_t stream) {
  return WithType(dtype, [&]<typename T>(T) {
    EmbedKernel<<<rows, kThreads, 0, stream>>>(static_cast<const T*>(embedding), tokens, hidden, x);
    return Launched("embedding");
  });
}

Status RmsNorm(DType dtype, const float* x, const uint32_t* rows_of, const float* weight, float eps,
               uint32_t rows, uint32_t hidden, void* out, cudaStream_t stream) {
  return WithType(dtype, [&]<typename T>(T) {
    RmsNormKernel<<<rows, kThreads, 0, stream>>>(x, rows_of, weight, eps, hidden,
                                                 static_cast<T*>(out));
    return Launched("norm");
  });
}

Status SplitAndStore(const SplitQkv& args, uint32_t rows, cudaStream_t stream) {
  const uint32_t heads = args.query_heads + 2 * args.kv_heads;
  const dim3 grid(rows, (heads + kWarps - 1) / kWarps);
  return WithType(args.dtype, [&]<typename T>(T) {
    return WithType(args.cache.dtype, [&]<typename C>(C) {
      SplitAndStoreKernel<T, C><<<grid, kThreads, 0, stream>>>(args);
      return Launched("KV write");
    });
  });
}

Status SwiGlu(DType dtype, const void* gate_up, const float* bias, uint32_t rows, uint32_t width,
              void* out, cudaStream_t stream) {
  return WithType(dtype, [&]<typename T>(T) {
    SwiGluKernel<<<dim3(rows, Blocks(width)), kThreads, 0, stream>>>(
        static_cast<const T*>(gate_up), bias, width, static_cast<T*>(out));
    return Launched("SwiGLU");
  });
}

Status AddBias(const float* bias, uint32_t rows, uint32_t width, float* x, cudaStream_t stream) {
  AddBiasKernel<<<dim3(rows, Blocks(width)), kThreads, 0, stream>>>(bias, width, x);
  return Launched("bias");
}

Status AddParts(const Parts& parts, size_t count, float* x, cudaStream_t stream) {
  AddPartsKernel<<<Blocks(count), kThreads, 0, stream>>>(parts, count, x);
  return Launched("adding the ranks' parts");
}

Status Likeliest(const float* logits, uint32_t rows, uint32_t width, uint32_t first_id,
                 ScoredToken* out, cudaStream_t stream) {
  LikeliestKernel<<<rows, kThreads, 0, stream>>>(logits, width, first_id, out);
  return Launched("the likeliest token");
}

}  // namespace kvrelay::engine::cuda
