#include "kvcache/cuda/driver.h"

#include <cuda_runtime_api.h>

namespace kvrelay::cuda {
namespace {

constexpr unsigned kVersion = 12000;  // of the functions' signatures

template <typename Function>
Status FindOne(const char* name, Function& function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess || found == nullptr) {
    return {Code::kRefused,
            std::string("the CUDA driver has no ") + name +
                (error == cudaSuccess ? "" : std::string(": ") + cudaGetErrorString(error))};
  }
  function = reinterpret_cast<Function>(found);
  return {};
}

}  // namespace

Result<Driver> Driver::Find() {
  Driver d;
  KVRELAY_RETURN_IF_ERROR(FindOne("cuMemGetAllocationGranularity", d.MemGetAllocationGranularity));
  KVRELAY_RETURN_IF_ERROR(FindOne("cuMemCreate", d.MemCreate));
  KVRELAY_RETURN_IF_ERROR(FindOne("cuMemRelease", d.MemRelease));
  KVRELAY_RETURN_IF_ERROR(FindOne("cuMemAddressReserve", d.MemAddressReserve));
  KVRELAY_RETURN_IF_ERROR(FindOne("cuMemAddressFree", d.MemAddressFree));
  KVRELAY_RETURN_IF_ERROR(FindOne("cuMemMap", d.MemMap));
  KVRELAY_RETURN_IF_ERROR(FindOne("cuMemUnmap", d.MemUnmap));
  KVRELAY_RETURN_IF_ERROR(FindOne("cuMemSetAccess", d.MemSetAccess));
  KVRELAY_RETURN_IF_ERROR(FindOne("cuMemExportToShareableHandle", d.MemExportToShareableHandle));
  KVRELAY_RETURN_IF_ERROR(
      FindOne("cuMemImportFromShareableHandle", d.MemImportFromShareableHandle));
  KVRELAY_RETURN_IF_ERROR(FindOne("cuMemRetainAllocationHandle", d.MemRetainAllocationHandle));
  KVRELAY_RETURN_IF_ERROR(FindOne("cuMemGetAddressRange", d.MemGetAddressRange));
  KVRELAY_RETURN_IF_ERROR(FindOne("cuGetErrorName", d.GetErrorName));
  return d;
}

std::string Driver::Name(CUresult error) const {
  const char* name = nullptr;
  if (GetErrorName(error, &name) == CUDA_SUCCESS && name != nullptr) return name;
  return "CUDA error " + std::to_string(error);
}

}  // namespace kvrelay::cuda
