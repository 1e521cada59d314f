#include "engine/cuda/blas.h"

#include <dlfcn.h>

#include <string>
#include <utility>

namespace kvrelay::engine::cuda {
namespace {

// What cuBLAS advises for Hopper.
constexpr size_t kWorkspaceBytes = size_t{32} << 20;

template <typename Function>
bool FindOne(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  return function != nullptr;
}

Result<BlasLibrary> Open() {
  // Of the toolkit that this was built with; other versions' calls may differ.
  const std::string name = "libcublas.so." + std::to_string(CUDART_VERSION / 1000);
  void* const library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const why = ::dlerror();
    return Error(Code::kNotFound,
                 name +
                     " is needed to compute on a GPU (it comes with the CUDA toolkit; "
                     "LD_LIBRARY_PATH can name its folder): " +
                     (why == nullptr ? "not found" : why));
  }
  BlasLibrary blas;
  if (!FindOne(library, "cublasCreate_v2", blas.Create) ||
      !FindOne(library, "cublasDestroy_v2", blas.Destroy) ||
      !FindOne(library, "cublasSetStream_v2", blas.SetStream) ||
      !FindOne(library, "cublasSetWorkspace_v2", blas.SetWorkspace) ||
      !FindOne(library, "cublasGemmEx", blas.GemmEx) ||
      !FindOne(library, "cublasGetStatusString", blas.GetStatusString)) {
    return Error(Code::kNotFound, name + " lacks a function that is needed");
  }
  return blas;
}

cudaDataType DataType(DType dtype) {
  switch (dtype) {
    case DType::kFp16:
      return CUDA_R_16F;
    case DType::kBf16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

}  // namespace

Result<const BlasLibrary*> BlasLibrary::Load() {
  static const Result<BlasLibrary> library = Open();
  if (!library) return Error(library.error());
  return &*library;
}

Status Blas::Check(cublasStatus_t status, const char* what) const {
  if (status == CUBLAS_STATUS_SUCCESS) return Status::Ok();
  return {Code::kInternal, std::string(what) + ": cuBLAS: " + library_->GetStatusString(status)};
}

Result<Blas> Blas::Create(cudaStream_t stream) {
  KVRELAY_ASSIGN_OR_RETURN(const BlasLibrary* library, BlasLibrary::Load());
  KVRELAY_ASSIGN_OR_RETURN(DeviceBuffer<std::byte> workspace,
                           AllocateDevice<std::byte>(kWorkspaceBytes, "cuBLAS's workspace"));
  cublasHandle_t created = nullptr;
  const cublasStatus_t status = library->Create(&created);
  Blas blas(library, Handle(created, Close{library}), std::move(workspace));
  KVRELAY_RETURN_IF_ERROR(blas.Check(status, "starting cuBLAS"));
  KVRELAY_RETURN_IF_ERROR(blas.Check(library->SetStream(created, stream), "cuBLAS's stream"));
  KVRELAY_RETURN_IF_ERROR(
      blas.Check(library->SetWorkspace(created, blas.workspace_.get(), kWorkspaceBytes),
                 "cuBLAS's workspace"));
  return blas;
}

// cuBLAS counts columns first: its first matrix is our weights, its result our rows.
Status Blas::Multiply(DType dtype, const void* x, uint32_t rows, uint32_t inputs,
                      const void* weights, uint32_t outputs, DType out_dtype, void* out,
                      bool add) const {
  const float alpha = 1;
  const float beta = add ? 1 : 0;
  const auto n = [](uint32_t count) { return static_cast<int>(count); };
  return Check(library_->GemmEx(handle_.get(), CUBLAS_OP_T, CUBLAS_OP_N, n(outputs), n(rows),
                                n(inputs), &alpha, weights, DataType(dtype), n(inputs), x,
                                DataType(dtype), n(inputs), &beta, out, DataType(out_dtype),
                                n(outputs), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
               "a matrix product");
}

}  // namespace kvrelay::engine::cuda
