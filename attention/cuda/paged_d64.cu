#include "attention/cuda/paged_tensor.cuh"

namespace kvrelay::attention::cuda {

std::optional<PagedKernel> TensorKernelD64(DType dtype, DType cache_dtype) {
  return TensorKernelFor<64>(dtype, cache_dtype);
}

}  // namespace kvrelay::attention::cuda
