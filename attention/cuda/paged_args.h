// The launches of paged attention.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/cuda/paged_cuda.h"
#include "attention/cuda/paged_plan.h"

namespace kvrelay::attention::cuda {

struct PagedArgs {
  PagedSizes sizes;
  PagedPlan plan;
  PagedLayer layer;
  const BlockId* blocks;
  const BlockId* prefix_blocks;
  uint32_t blocks_stride;
  uint32_t prefix_blocks_stride;
  DType dtype;
  DType cache_dtype;
  const void* q;
  void* out;
  float* lse;
};

// A kernel for some shapes.
struct PagedKernel {
  TileRows tile;
  uint32_t ctas_per_sm;
  uint32_t shared_bytes;  // of a CTA
  cudaError_t (*launch)(const PagedArgs& args, cudaStream_t stream);
};

// Serves every shape, on CUDA cores.
PagedKernel GeneralKernel(const PagedShape& shape);

// Fills the plan from the batch.
cudaError_t LaunchPagedSchedule(const PagedSizes& sizes, const PagedBatch& batch,
                                const PagedPlan& plan, cudaStream_t stream);

}  // namespace kvrelay::attention::cuda
