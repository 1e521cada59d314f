// Paged attention of a step on any NVIDIA GPU of compute capability 8.0 or more: prefill chunks and
// decode rows of many sequences in one launch, every kind of layer and type of cache.
//
// Compiles without CUDA. Shapes: Q is [row][query head][head_dim] and O [row][query
// head][value_dim], both dense, of type `dtype`; rows of one sequence are consecutive tokens. LSE
// is fp32 [row][query head], natural log of the sum of exp(logits); -inf where a row sees no key
// (its O is zeros). Query head h uses KV head h / (query_heads / kv_heads). What a row sees, and
// the order of scale, soft cap, bias and mask, is attention.h's (Sequence, AttentionKind). A stored
// number q of the cache means q times its scale. Sums are fp32.
//
// MLA as in attention.h: no V, value_dim the latent's part of a row.
//
// Order of a step: Schedule once, then Attend for each layer, all on one stream. Both only launch
// kernels, which read rows, lengths, tables and prefixes on the device: a captured CUDA graph stays
// valid while those change. Equal inputs give equal bits.
//
// Threads: const members from any thread. Device memory is the caller's, on the device that was
// current at Create, and must outlive the launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "attention/cuda/relay_cuda.h"
#include "base/status.h"
#include "kvcache/layout.h"

namespace kvrelay::attention::cuda {

// Nothing when the current device can run these kernels, else why not.
Status PagedDeviceUsable();

struct PagedShape {
  uint32_t query_heads = 0;
  uint32_t kv_heads = 0;             // divides query_heads
  uint32_t head_dim = 128;           // a multiple of 8, at most 576
  uint32_t value_dim = 0;            // a multiple of 8, at most head_dim; 0: head_dim
  DType dtype = DType::kBf16;        // of Q and O: fp32, fp16 or bf16
  DType cache_dtype = DType::kBf16;  // any
  uint32_t block_size = 16;          // tokens
  uint32_t max_sequences = 0;
  uint32_t max_rows = 0;  // of all sequences together
  float scale = 1.0F;
  // Layers that see other windows have a schedule, and a workspace, of their own.
  uint32_t window = 0;
};

// Scales of a layer's cache, fp32 in device memory: sequence s's KV head h has
// [s * sequence_step + h * head_step]. Null: 1.
struct LayerScales {
  const float* k = nullptr;
  const float* v = nullptr;
  uint32_t sequence_step = 0;  // 0: all sequences have the same
  uint32_t head_step = 0;      // 0: all heads have the same
};

struct PagedLayer {
  // Addresses and strides are multiples of 8 bytes, better of 16. v null: V is the first value_dim
  // columns of K's row.
  LayerCache cache;
  LayerScales scales;
  float soft_cap = 0;
  const float* alibi_slopes = nullptr;  // [query_heads], in device memory; null: none
};

// A step's sequences, all arrays in device memory.
struct PagedBatch {
  // `contexts` count a sequence's new rows; requests are the sequences, those not in use have no
  // rows (or, where first_rows is null, context 0). prefixes null: nobody has one.
  StepBatch requests;
  // [max_sequences + 1] sequence s has the rows [first_rows[s], first_rows[s + 1]), the last ends
  // at most at max_rows. Null: sequence s has row s alone.
  const uint32_t* first_rows = nullptr;
};

class PagedKernels {
 public:
  // kIncompatible, with the reason, where the device or the shape cannot be served.
  static Result<PagedKernels> Create(const PagedShape& shape);

  const PagedShape& shape() const { return shape_; }
  // Device memory that Schedule and Attend of one stream share. Its contents need not be set.
  size_t workspace_bytes() const { return workspace_bytes_; }

  Status Schedule(const PagedBatch& batch, void* workspace, Stream stream) const;
  // `q` and `out` are 16-byte aligned; `batch` as in Schedule. Rows of no sequence are not written.
  Status Attend(const PagedLayer& layer, const PagedBatch& batch, const void* q, void* out,
                float* lse, void* workspace, Stream stream) const;

 private:
  PagedKernels() = default;
  PagedShape shape_;
  uint32_t multiprocessors_ = 0;
  uint32_t shared_bytes_ = 0;
  size_t workspace_bytes_ = 0;
};

}  // namespace kvrelay::attention::cuda
