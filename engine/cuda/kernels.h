// What a Llama layer needs of a GPU beside matrix products and attention.
//
// All launch on `stream` and return; arrays are in device memory, rows dense. Activations are of
// the arithmetic's type (`dtype`: fp32, fp16 or bf16), the residual stream, norms' weights, biases
// and logits fp32; sums are fp32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "base/status.h"
#include "engine/model.h"
#include "kvcache/layout.h"

namespace kvrelay::engine::cuda {

// A row's place in the cache when it has none: nothing is written.
inline constexpr BlockId kNoBlock = 0xffffffff;

// out[i] = in[i], as `dtype`.
Status Narrow(DType dtype, const float* in, size_t count, void* out, cudaStream_t stream);

// x[row] = embedding[tokens[row]]
Status Embed(DType dtype, const void* embedding, const uint32_t* tokens, uint32_t rows,
             uint32_t hidden, float* x, cudaStream_t stream);

// out[i] = RMSNorm of x[i], or of x[rows_of[i]].
Status RmsNorm(DType dtype, const float* x, const uint32_t* rows_of, const float* weight, float eps,
               uint32_t rows, uint32_t hidden, void* out, cudaStream_t stream);

// A layer's cache of a rank.
struct CacheLayer {
  std::byte* k = nullptr;  // block 0, head 0, token 0
  std::byte* v = nullptr;
  uint64_t block_stride = 0;  // bytes
  uint64_t head_stride = 0;
  uint64_t token_stride = 0;
  uint32_t block_size = 0;
  DType dtype = DType::kFp32;
};

// Behind the product that makes Q, K and V: bias, norm of heads, rotation, and where they go.
struct SplitQkv {
  DType dtype = DType::kFp32;
  uint32_t query_heads = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;  // even, at most 1024
  float eps = 0;
  const void* qkv = nullptr;      // [row][query_heads + 2 * kv_heads][head_dim]
  const float* bias = nullptr;    // of such a row; null: none, as below
  const float* q_norm = nullptr;  // [head_dim]
  const float* k_norm = nullptr;
  const float* inverse_frequencies = nullptr;  // [head_dim / 2]
  const uint32_t* positions = nullptr;         // [row]
  const BlockId* blocks = nullptr;             // [row]
  void* q = nullptr;                           // [row][query_heads][head_dim]
  CacheLayer cache;
};
Status SplitAndStore(const SplitQkv& args, uint32_t rows, cudaStream_t stream);

// out[row][i] = silu(gate) * up, of gate_up[row] = gate[width], up[width] with its bias added.
Status SwiGlu(DType dtype, const void* gate_up, const float* bias, uint32_t rows, uint32_t width,
              void* out, cudaStream_t stream);

// x[row] += bias
Status AddBias(const float* bias, uint32_t rows, uint32_t width, float* x, cudaStream_t stream);

// x += the sum of `ranks` parts, in their order. The parts may be peers' memory.
inline constexpr uint32_t kMaxPeers = 16;
struct Parts {
  const float* of_rank[kMaxPeers] = {};
  uint32_t ranks = 0;
};
Status AddParts(const Parts& parts, size_t count, float* x, cudaStream_t stream);

// out[row]: the largest of a row of `width` logits, the first of equals; NaN only where there is
// nothing else. Ids count from first_id.
Status Likeliest(const float* logits, uint32_t rows, uint32_t width, uint32_t first_id,
                 ScoredToken* out, cudaStream_t stream);

}  // namespace kvrelay::engine::cuda
