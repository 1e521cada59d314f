#include "attention/cuda/paged_tensor.cuh"

namespace kvrelay::attention::cuda {

std::optional<PagedKernel> TensorKernelD256(DType dtype, DType cache_dtype) {
  return TensorKernelFor<256>(dtype, cache_dtype);
}

}  // namespace kvrelay::attention::cuda
