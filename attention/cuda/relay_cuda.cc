#include "attention/cuda/relay_cuda.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <numeric>

#include "attention/cuda/carve.h"
#include "attention/cuda/cuda_status.h"
#include "attention/cuda/launch.h"

namespace kvrelay::attention::cuda {
namespace {

constexpr uint32_t kMaxRequests = 16384;
constexpr uint32_t kMaxPrefixes = 4096;

LaunchAttend* AttendFor(const RelayShape& shape) {
  const bool bf16 = shape.dtype == DType::kBf16;
  if (!bf16 && shape.dtype != DType::kFp16) return nullptr;
  if (shape.head_dim == 128) return bf16 ? LaunchAttendD128Bf16 : LaunchAttendD128Fp16;
  if (shape.head_dim == 64) return bf16 ? LaunchAttendD64Bf16 : LaunchAttendD64Fp16;
  return nullptr;
}

// Query heads of a KV head are taken as several heads when they are too many for one tile.
uint32_t HeadsPerKv(uint32_t group) {
  uint32_t parts = 1;
  while (group % parts != 0 || group / parts > kMaxGroup) ++parts;
  return parts;
}

AttendShape ShapeOf(const RelayShape& shape, uint32_t multiprocessors) {
  constexpr float kLog2E = 1.44269504088896F;
  const uint32_t group = shape.query_heads / shape.kv_heads;
  AttendShape attend;
  attend.heads_per_kv = HeadsPerKv(group);
  attend.heads = shape.kv_heads * attend.heads_per_kv;
  attend.group = group / attend.heads_per_kv;
  attend.block_size = shape.block_size;
  attend.max_requests = shape.max_requests;
  attend.max_prefixes = shape.max_prefixes;
  attend.multiprocessors = multiprocessors;
  attend.scale_log2 = shape.scale * kLog2E;
  return attend;
}

// The plan in `workspace`; null: only how many bytes it takes.
Plan PlanIn(void* workspace, const AttendShape& shape, uint32_t head_dim, size_t* bytes) {
  const PlanLimits limits(shape);
  Plan plan = {};
  plan.first_suffix_row = limits.prefix_parts() * kTileRows;
  const size_t rows = plan.first_suffix_row + size_t{limits.chunks} * shape.heads * shape.group;
  Carve carve(workspace);
  carve.Take(plan.header, 1);
  carve.Take(plan.first, shape.multiprocessors);
  carve.Take(plan.begun, shape.multiprocessors);
  carve.Take(plan.relayed, shape.max_prefixes);
  carve.Take(plan.members, shape.max_requests);
  carve.Take(plan.requests, shape.max_requests);
  carve.Take(plan.chunks, limits.chunks);
  carve.Take(plan.contributions, size_t{shape.max_requests} * shape.heads);
  carve.Take(plan.part_sums, rows);
  carve.Take(plan.part_rows, rows * head_dim);
  if (bytes != nullptr) *bytes = carve.bytes();
  return plan;
}

// Found at run time: nothing links the driver's library.
Result<PFN_cuTensorMapEncodeTiled_v12000> EncodeFunction() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    return Error(Code::kIncompatible,
                 "the driver has no cuTensorMapEncodeTiled (CUDA 12 is needed)");
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

Status DeviceUsable() {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  int major = 0;
  int minor = 0;
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (error != cudaSuccess) {
    return {Code::kIncompatible, std::string("no CUDA device: ") + cudaGetErrorString(error)};
  }
  if (major != 9 || minor != 0) {
    return {Code::kIncompatible, "the kernels are for compute capability 9.0, the device has " +
                                     std::to_string(major) + "." + std::to_string(minor)};
  }
  return Status::Ok();
}

Result<RelayKernels> RelayKernels::Create(const RelayShape& shape) {
  if (Status usable = DeviceUsable(); !usable.ok()) return Error(usable);
  if (shape.kv_heads == 0 || shape.query_heads == 0 || shape.query_heads % shape.kv_heads != 0) {
    return Error(Code::kIncompatible, std::to_string(shape.query_heads) +
                                          " query heads do not share " +
                                          std::to_string(shape.kv_heads) + " KV heads evenly");
  }
  if (AttendFor(shape) == nullptr) {
    return Error(Code::kIncompatible, "no kernel for head size " + std::to_string(shape.head_dim) +
                                          " of " + std::string(DTypeName(shape.dtype)) +
                                          " (64 and 128 of bf16 and fp16 exist)");
  }
  if (shape.block_size == 0 || shape.block_size % 16 != 0) {
    return Error(Code::kIncompatible, "blocks of " + std::to_string(shape.block_size) +
                                          " tokens: a multiple of 16 is needed");
  }
  if (shape.max_requests == 0 || shape.max_requests > kMaxRequests ||
      shape.max_prefixes > kMaxPrefixes) {
    return Error(Code::kIncompatible, std::to_string(shape.max_requests) + " requests and " +
                                          std::to_string(shape.max_prefixes) +
                                          " prefixes: at most " + std::to_string(kMaxRequests) +
                                          " and " + std::to_string(kMaxPrefixes));
  }
  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return Error(CudaStatus(error, "reading the device's properties"));
  RelayKernels kernels;
  kernels.shape_ = shape;
  kernels.multiprocessors_ = static_cast<uint32_t>(multiprocessors);
  PlanIn(nullptr, ShapeOf(shape, kernels.multiprocessors_), shape.head_dim,
         &kernels.workspace_bytes_);
  return kernels;
}

Result<LayerMaps> RelayKernels::MapLayer(const LayerCache& cache) const {
  const auto encode = EncodeFunction();
  if (!encode) return Error(encode.error());
  for (const uint64_t stride : {cache.block_stride, cache.head_stride, cache.token_stride}) {
    if (stride == 0 || stride % 16 != 0) {
      return Error(Code::kIncompatible,
                   "stride of " + std::to_string(stride) + " bytes: a multiple of 16 is needed");
    }
  }
  // Blocks, heads and units of 16 tokens are one dimension, in steps that all strides are multiples
  // of.
  const uint64_t unit_stride = 16 * cache.token_stride;
  const uint64_t step = std::gcd(std::gcd(cache.block_stride, cache.head_stride), unit_stride);
  const uint64_t block_step = cache.block_stride / step;
  const uint64_t head_step = cache.head_stride / step;
  const uint64_t unit_step = unit_stride / step;
  const uint32_t block_units = shape_.block_size / 16;
  const uint64_t places = (uint64_t{cache.num_blocks} - 1) * block_step +
                          (uint64_t{shape_.kv_heads} - 1) * head_step +
                          (block_units - 1) * unit_step + 1;
  if (cache.num_blocks == 0 || places > INT32_MAX) {
    return Error(Code::kIncompatible, std::to_string(cache.num_blocks) +
                                          " blocks cannot be addressed in steps of " +
                                          std::to_string(step) + " bytes");
  }
  const cuuint64_t sizes[5] = {64, 8, shape_.head_dim / 64, 2, places};
  const cuuint64_t strides[4] = {cache.token_stride, 128, 8 * cache.token_stride, step};
  const cuuint32_t box[5] = {64, 8, shape_.head_dim / 64, 2, 1};
  const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = shape_.dtype == DType::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  CacheMaps maps = {};
  maps.block_step = static_cast<uint32_t>(block_step);
  maps.head_step = static_cast<uint32_t>(head_step);
  maps.unit_step = static_cast<uint32_t>(unit_step);
  maps.block_units = block_units;
  maps.block_units_inverse = UINT32_MAX / block_units + 1;
  for (const auto& [map, base] : {std::pair{&maps.k, cache.k}, std::pair{&maps.v, cache.v}}) {
    const CUresult result =
        (*encode)(map, type, 5, const_cast<void*>(base), sizes, strides, box, ones,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
      return Error(Code::kIncompatible,
                   "cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
    }
  }
  LayerMaps layer;
  static_assert(sizeof(layer) == sizeof(maps) && alignof(LayerMaps) == alignof(CacheMaps));
  std::memcpy(layer.bytes.data(), &maps, sizeof(maps));
  return layer;
}

Status RelayKernels::Schedule(const StepBatch& batch, RelayMode mode, void* workspace,
                              Stream stream) const {
  const AttendShape shape = ShapeOf(shape_, multiprocessors_);
  const Plan plan = PlanIn(workspace, shape, shape_.head_dim, nullptr);
  return CudaStatus(
      LaunchSchedule(shape, shape_.head_dim, batch, mode, plan, static_cast<cudaStream_t>(stream)),
      "launching the schedule kernel");
}

Status RelayKernels::Attend(const LayerMaps& layer, const StepBatch& batch, const void* q,
                            void* out, float* lse, void* workspace, Stream stream) const {
  CacheMaps maps;
  std::memcpy(&maps, layer.bytes.data(), sizeof(maps));
  AttendArgs args = {};
  args.shape = ShapeOf(shape_, multiprocessors_);
  args.plan = PlanIn(workspace, args.shape, shape_.head_dim, nullptr);
  args.tables = {batch.blocks, batch.prefix_blocks, batch.blocks_stride,
                 batch.prefix_blocks_stride};
  args.q = q;
  args.out = out;
  args.lse = lse;
  return CudaStatus(AttendFor(shape_)(maps, args, static_cast<cudaStream_t>(stream)),
                    "launching the attention kernel");
}

}  // namespace kvrelay::attention::cuda
