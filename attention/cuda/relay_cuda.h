// Relay attention of one decode step on an NVIDIA GPU (Hopper): requests that share a prefix read
// its K and V once. Plain paged decode is the same call with no prefixes.
//
// Compiles without CUDA: streams and device memory are opaque pointers. Shapes: Q and O are
// [request][query head][head_dim] of the cache's type, dense; LSE is fp32 [request][query head],
// natural log of the sum of exp(logits), -inf where a request sees no key (its O is zeros). One
// query row per request, which sees all of its tokens. Query head h uses KV head
// h / (query_heads / kv_heads). Logits are scaled by `scale`. Products of 16-bit numbers are summed
// in fp32.
//
// Order of a step: Schedule once, then Attend for each layer, all on one stream. Both only launch
// kernels, which read lengths, block tables and prefixes on the device: a captured CUDA graph stays
// valid while those change. Equal inputs give equal bits.
//
// Threads: const members from any thread. Device memory is the caller's, on the device that was
// current at Create, and must outlive the launches.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/status.h"
#include "kvcache/layout.h"

namespace kvrelay::attention::cuda {

using Stream = void*;  // a cudaStream_t; null: the default stream

inline constexpr uint32_t kNoPrefix = 0xffffffff;

// Nothing when the current device can run these kernels, else why not.
Status DeviceUsable();

struct RelayShape {
  uint32_t query_heads = 0;
  uint32_t kv_heads = 0;  // divides query_heads
  uint32_t head_dim = 128;
  DType dtype = DType::kBf16;  // of Q, K, V and O
  uint32_t block_size = 16;    // tokens, a multiple of 16
  uint32_t max_requests = 0;
  uint32_t max_prefixes = 0;
  float scale = 1.0F;
};

// A layer's K and V in device memory; strides in bytes as in KvLayout, multiples of 16.
struct LayerCache {
  const void* k = nullptr;  // block 0, head 0, token 0
  const void* v = nullptr;
  uint32_t num_blocks = 0;
  uint64_t block_stride = 0;
  uint64_t head_stride = 0;
  uint64_t token_stride = 0;
};

// How the copy engine addresses a layer's cache: made once per layer, passed by value to launches.
struct alignas(128) LayerMaps {
  std::array<std::byte, 384> bytes;
};

// A step's requests, all arrays in device memory. A request is a row below max_requests; rows that
// are not in use have context 0. A request with fewer tokens than its prefix is taken to have none.
struct StepBatch {
  const uint32_t* contexts = nullptr;  // [max_requests] tokens in the cache, the prefix's included
  const uint32_t* prefixes = nullptr;  // [max_requests] index of its prefix, or kNoPrefix
  const BlockId* blocks = nullptr;     // [max_requests][blocks_stride] its own blocks
  uint32_t blocks_stride = 0;
  const uint32_t* prefix_tokens = nullptr;  // [max_prefixes] a multiple of block_size
  const BlockId* prefix_blocks = nullptr;   // [max_prefixes][prefix_blocks_stride]
  uint32_t prefix_blocks_stride = 0;
};

// When a prefix gets a pass of its own; kAuto: where the step is predicted to end earlier.
enum class RelayMode : uint8_t { kAuto = 0, kAlways = 1, kNever = 2 };

class RelayKernels {
 public:
  // kIncompatible, with the reason, where the device or the shape cannot be served.
  static Result<RelayKernels> Create(const RelayShape& shape);

  const RelayShape& shape() const { return shape_; }
  // Device memory that Schedule and Attend of one stream share. Its contents need not be set.
  size_t workspace_bytes() const { return workspace_bytes_; }
  Result<LayerMaps> MapLayer(const LayerCache& cache) const;

  Status Schedule(const StepBatch& batch, RelayMode mode, void* workspace, Stream stream) const;
  // `q`, `out` (16-byte aligned) and `lse` as above; `batch` as in Schedule.
  Status Attend(const LayerMaps& layer, const StepBatch& batch, const void* q, void* out,
                float* lse, void* workspace, Stream stream) const;

 private:
  RelayKernels() = default;
  RelayShape shape_;
  uint32_t multiprocessors_ = 0;
  size_t workspace_bytes_ = 0;
};

}  // namespace kvrelay::attention::cuda
