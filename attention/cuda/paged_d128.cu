#include "attention/cuda/paged_tensor.cuh"

namespace kvrelay::attention::cuda {

std::optional<PagedKernel> TensorKernelD128(DType dtype, DType cache_dtype) {
  return TensorKernelFor<128>(dtype, cache_dtype);
}

}  // namespace kvrelay::attention::cuda
