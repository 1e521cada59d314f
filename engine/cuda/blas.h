// cuBLAS, found at run time: programs start without it, and those on the host alone never ask.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "base/status.h"
#include "engine/cuda/cuda_memory.h"
#include "kvcache/layout.h"

namespace kvrelay::engine::cuda {

struct BlasLibrary {
  decltype(&::cublasCreate_v2) Create = nullptr;
  decltype(&::cublasDestroy_v2) Destroy = nullptr;
  decltype(&::cublasSetStream_v2) SetStream = nullptr;
  decltype(&::cublasSetWorkspace_v2) SetWorkspace = nullptr;
  cublasStatus_t (*GemmEx)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
                           const void*, const void*, cudaDataType, int, const void*, cudaDataType,
                           int, const void*, void*, cudaDataType, int, cublasComputeType_t,
                           cublasGemmAlgo_t) = nullptr;
  decltype(&::cublasGetStatusString) GetStatusString = nullptr;

  // Loaded once and kept. kNotFound names the library, and where it is looked for.
  static Result<const BlasLibrary*> Load();
};

// Matrix products on one stream of the device that is current. One thread at a time.
class Blas {
 public:
  static Result<Blas> Create(cudaStream_t stream);

  // out[row][o] = sum over k of x[row][k] * weights[o][k], plus out's values where `add`. x and
  // weights are `dtype`, out is `out_dtype`: the same, or fp32. fp32 products are of fp32 numbers,
  // not of tf32's. Can be captured into a graph.
  Status Multiply(DType dtype, const void* x, uint32_t rows, uint32_t inputs, const void* weights,
                  uint32_t outputs, DType out_dtype, void* out, bool add) const;

 private:
  struct Close {
    const BlasLibrary* library;
    void operator()(cublasHandle_t handle) const { library->Destroy(handle); }
  };
  using Handle = std::unique_ptr<std::remove_pointer_t<cublasHandle_t>, Close>;

  Blas(const BlasLibrary* library, Handle handle, DeviceBuffer<std::byte> workspace)
      : library_(library), workspace_(std::move(workspace)), handle_(std::move(handle)) {}
  Status Check(cublasStatus_t status, const char* what) const;

  const BlasLibrary* library_;
  DeviceBuffer<std::byte> workspace_;  // the handle's: graphs keep its address
  Handle handle_;
};

}  // namespace kvrelay::engine::cuda
