#include "attention/cuda/paged_cuda.h"

#include <cuda_runtime_api.h>

#include "attention/cuda/carve.h"
#include "attention/cuda/cuda_status.h"
#include "attention/cuda/paged_args.h"
#include "attention/cuda/paged_tensor.h"

namespace kvrelay::attention::cuda {
namespace {

constexpr uint32_t kMaxHeadDim = 576;
constexpr uint32_t kMaxSequences = 65536;
constexpr uint32_t kMaxPackedRows = 1U << 28;

Result<int> DeviceAttribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  if (error != cudaSuccess) {
    return Error(Code::kIncompatible, std::string("no CUDA device: ") + cudaGetErrorString(error));
  }
  return value;
}

PagedSizes SizesOf(const PagedShape& shape, const PagedKernel& kernel, uint32_t multiprocessors) {
  PagedSizes sizes;
  sizes.kv_heads = shape.kv_heads;
  sizes.group = shape.query_heads / shape.kv_heads;
  sizes.head_dim = shape.head_dim;
  sizes.value_dim = shape.value_dim;
  sizes.block_size = shape.block_size;
  sizes.window = shape.window;
  sizes.max_sequences = shape.max_sequences;
  sizes.max_rows = shape.max_rows;
  sizes.ctas = multiprocessors * kernel.ctas_per_sm;
  sizes.tile = kernel.tile;
  sizes.scale = shape.scale;
  return sizes;
}

// The plan in `workspace`; null: only how many bytes it takes.
PagedPlan PagedPlanIn(void* workspace, const PagedSizes& sizes, size_t* bytes) {
  const PagedLimits limits(sizes);
  PagedPlan plan = {};
  Carve carve(workspace);
  carve.Take(plan.header, 1);
  carve.Take(plan.first_tiles, size_t{sizes.max_sequences} + 1);
  carve.Take(plan.tiles, limits.tiles);
  carve.Take(plan.items, limits.items);
  carve.Take(plan.contributions, size_t{limits.tiles} * sizes.kv_heads);
  carve.Take(plan.part_sums, limits.part_rows);
  carve.Take(plan.part_rows, limits.part_rows * sizes.value_dim);
  if (bytes != nullptr) *bytes = carve.bytes();
  return plan;
}

TensorKernel* TensorKernelOfSize(uint32_t head_dim) {
  switch (head_dim) {
    case 64:
      return TensorKernelD64;
    case 80:
      return TensorKernelD80;
    case 96:
      return TensorKernelD96;
    case 128:
      return TensorKernelD128;
    case 192:
      return TensorKernelD192;
    case 256:
      return TensorKernelD256;
    default:
      return nullptr;
  }
}

// `shared_bytes`: what the device has for a CTA.
PagedKernel KernelFor(const PagedShape& shape, uint32_t shared_bytes) {
  TensorKernel* of_size = TensorKernelOfSize(shape.head_dim);
  if (of_size != nullptr && shape.value_dim == shape.head_dim) {
    const std::optional<PagedKernel> kernel = of_size(shape.dtype, shape.cache_dtype);
    if (kernel.has_value() && kernel->shared_bytes <= shared_bytes) return *kernel;
  }
  if (const std::optional<PagedKernel> kernel = MlaKernel(shape);
      kernel.has_value() && kernel->shared_bytes <= shared_bytes) {
    return *kernel;
  }
  return GeneralKernel(shape);
}

Status CheckShape(const PagedShape& shape) {
  const auto refuse = [](const std::string& why) { return Status(Code::kIncompatible, why); };
  if (shape.kv_heads == 0 || shape.query_heads == 0 || shape.query_heads % shape.kv_heads != 0) {
    return refuse(std::to_string(shape.query_heads) + " query heads do not share " +
                  std::to_string(shape.kv_heads) + " KV heads evenly");
  }
  if (shape.head_dim == 0 || shape.head_dim % 8 != 0 || shape.head_dim > kMaxHeadDim ||
      shape.value_dim % 8 != 0 || shape.value_dim > shape.head_dim) {
    return refuse("rows of " + std::to_string(shape.head_dim) + " and " +
                  std::to_string(shape.value_dim) + ": multiples of 8 up to " +
                  std::to_string(kMaxHeadDim) + ", V's no longer than K's");
  }
  if (shape.dtype != DType::kFp32 && shape.dtype != DType::kFp16 && shape.dtype != DType::kBf16) {
    return refuse("queries of " + std::string(DTypeName(shape.dtype)) + ": fp32, fp16 or bf16");
  }
  if (!(shape.scale > 0)) return refuse("a scale of " + std::to_string(shape.scale));
  if (shape.window > INT32_MAX) return refuse("a window of " + std::to_string(shape.window));
  if (shape.block_size == 0 || SizeOf(shape.cache_dtype) == 0) {
    return refuse("blocks of " + std::to_string(shape.block_size) + " tokens of type " +
                  std::to_string(static_cast<int>(shape.cache_dtype)));
  }
  if (shape.max_sequences == 0 || shape.max_sequences > kMaxSequences || shape.max_rows == 0 ||
      uint64_t{shape.max_rows} * shape.query_heads > kMaxPackedRows) {
    return refuse(std::to_string(shape.max_sequences) + " sequences with " +
                  std::to_string(shape.max_rows) + " rows of " + std::to_string(shape.query_heads) +
                  " query heads: at most " + std::to_string(kMaxSequences) +
                  ", and rows times heads at most " + std::to_string(kMaxPackedRows));
  }
  return Status::Ok();
}

}  // namespace

Status PagedDeviceUsable() {
  const Result<int> major = DeviceAttribute(cudaDevAttrComputeCapabilityMajor);
  if (!major) return major.error();
  if (*major < 8) {
    return {Code::kIncompatible,
            "the kernels are for compute capability 8.0 and up, the device has " +
                std::to_string(*major)};
  }
  return Status::Ok();
}

Result<PagedKernels> PagedKernels::Create(const PagedShape& shape) {
  if (Status usable = PagedDeviceUsable(); !usable.ok()) return Error(usable);
  PagedKernels kernels;
  kernels.shape_ = shape;
  if (shape.value_dim == 0) kernels.shape_.value_dim = shape.head_dim;
  if (Status served = CheckShape(kernels.shape_); !served.ok()) return Error(served);
  KVRELAY_ASSIGN_OR_RETURN(const int multiprocessors,
                           DeviceAttribute(cudaDevAttrMultiProcessorCount));
  KVRELAY_ASSIGN_OR_RETURN(const int shared_bytes,
                           DeviceAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  kernels.multiprocessors_ = static_cast<uint32_t>(multiprocessors);
  kernels.shared_bytes_ = static_cast<uint32_t>(shared_bytes);
  PagedPlanIn(nullptr,
              SizesOf(kernels.shape_, KernelFor(kernels.shape_, kernels.shared_bytes_),
                      kernels.multiprocessors_),
              &kernels.workspace_bytes_);
  return kernels;
}

Status PagedKernels::Schedule(const PagedBatch& batch, void* workspace, Stream stream) const {
  const PagedSizes sizes = SizesOf(shape_, KernelFor(shape_, shared_bytes_), multiprocessors_);
  return CudaStatus(LaunchPagedSchedule(sizes, batch, PagedPlanIn(workspace, sizes, nullptr),
                                        static_cast<cudaStream_t>(stream)),
                    "launching the schedule kernel");
}

Status PagedKernels::Attend(const PagedLayer& layer, const PagedBatch& batch, const void* q,
                            void* out, float* lse, void* workspace, Stream stream) const {
  const PagedKernel kernel = KernelFor(shape_, shared_bytes_);
  PagedArgs args = {};
  args.sizes = SizesOf(shape_, kernel, multiprocessors_);
  args.plan = PagedPlanIn(workspace, args.sizes, nullptr);
  args.layer = layer;
  args.blocks = batch.requests.blocks;
  args.blocks_stride = batch.requests.blocks_stride;
  args.prefix_blocks = batch.requests.prefix_blocks;
  args.prefix_blocks_stride = batch.requests.prefix_blocks_stride;
  args.dtype = shape_.dtype;
  args.cache_dtype = shape_.cache_dtype;
  args.q = q;
  args.out = out;
  args.lse = lse;
  return CudaStatus(kernel.launch(args, static_cast<cudaStream_t>(stream)),
                    "launching the attention kernel");
}

}  // namespace kvrelay::attention::cuda
