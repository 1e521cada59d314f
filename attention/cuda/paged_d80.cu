#include "attention/cuda/paged_tensor.cuh"

namespace kvrelay::attention::cuda {

std::optional<PagedKernel> TensorKernelD80(DType dtype, DType cache_dtype) {
  return TensorKernelFor<80>(dtype, cache_dtype);
}

}  // namespace kvrelay::attention::cuda
