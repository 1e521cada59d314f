// The kernels of paged attention on tensor cores: one for each head size and type of cache, each
// head size compiled alone.
#pragma once

#include <optional>

#include "attention/cuda/paged_args.h"

namespace kvrelay::attention::cuda {

// Nothing where the types are not served: fp32, and queries of another 16-bit type than the cache.
using TensorKernel = std::optional<PagedKernel>(DType dtype, DType cache_dtype);
TensorKernel TensorKernelD64;
TensorKernel TensorKernelD80;
TensorKernel TensorKernelD96;
TensorKernel TensorKernelD128;
TensorKernel TensorKernelD192;
TensorKernel TensorKernelD256;

// Rows of 576 of which 512 are V, of one 16-bit type.
std::optional<PagedKernel> MlaKernel(const PagedShape& shape);

}  // namespace kvrelay::attention::cuda
