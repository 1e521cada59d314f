#include "attention/cuda/paged_mla.cuh"

namespace kvrelay::attention::cuda {
namespace {

template <uint32_t kRows>
std::optional<PagedKernel> OfType(DType dtype) {
  return dtype == DType::kBf16 ? MlaKernelOf<__nv_bfloat16, kRows>() : MlaKernelOf<__half, kRows>();
}

}  // namespace

std::optional<PagedKernel> MlaKernel(const PagedShape& shape) {
  if (shape.head_dim != kLatentColumns || shape.value_dim != kLatentValues ||
      shape.dtype != shape.cache_dtype || shape.dtype == DType::kFp32) {
    return std::nullopt;
  }
  const uint32_t group = shape.query_heads / shape.kv_heads;
  return group <= 16 ? OfType<16>(shape.dtype) : OfType<64>(shape.dtype);
}

}  // namespace kvrelay::attention::cuda
