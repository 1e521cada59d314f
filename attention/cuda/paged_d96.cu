#include "attention/cuda/paged_tensor.cuh"

namespace kvrelay::attention::cuda {

std::optional<PagedKernel> TensorKernelD96(DType dtype, DType cache_dtype) {
  return TensorKernelFor<96>(dtype, cache_dtype);
}

}  // namespace kvrelay::attention::cuda
