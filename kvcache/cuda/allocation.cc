#include "kvcache/cuda/allocation.h"

#include <cuda_runtime_api.h>
#include <fcntl.h>

#include <atomic>
#include <iterator>
#include <string>

#include "kvcache/cuda/cuda_status.h"

namespace kvrelay::cuda {
namespace {

constexpr CUmemAllocationHandleType kDescriptor = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
constexpr unsigned kFabric = 8;  // CU_MEM_HANDLE_TYPE_FABRIC, of CUDA 12.3 on; others refuse it

CUmemAllocationProp PropertiesOn(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = kDescriptor;
  properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
  return properties;
}

}  // namespace

Result<uint64_t> Allocation::Granularity(const Driver& driver, int device) {
  const CUmemAllocationProp properties = PropertiesOn(device);
  size_t bytes = 0;
  const CUresult error =
      driver.MemGetAllocationGranularity(&bytes, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  if (error == CUDA_SUCCESS && bytes > 0) return bytes;
  return Error(Code::kRefused,
               "cuda:" + std::to_string(device) +
                   " has no memory that other processes can map: " + driver.Name(error));
}

Result<Allocation> Allocation::Create(const Driver& driver, int device, uint64_t bytes) {
  size_t free_bytes = 0;
  size_t all_bytes = 0;
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaMemGetInfo(&free_bytes, &all_bytes), "free memory"));
  const auto too_little = [&](const std::string& why) {
    return Error(Code::kResourceExhausted, "not enough memory on cuda:" + std::to_string(device) +
                                               ": asked " + std::to_string(bytes) +
                                               " bytes, free " + std::to_string(free_bytes) + why);
  };
  if (bytes > free_bytes) return too_little("");
  // Drivers and devices refuse what they do not have, and some say that they have what they refuse.
  // What was refused once is not asked for again.
  static constexpr Extras kWishes[] = {{true, true}, {false, true}, {false, false}};
  static std::atomic<size_t> first_wish = 0;
  CUresult error = CUDA_SUCCESS;
  for (size_t wish = first_wish; wish < std::size(kWishes); ++wish) {
    const Extras& extras = kWishes[wish];
    CUmemAllocationProp properties = PropertiesOn(device);
    if (extras.fabric) {
      properties.requestedHandleTypes =
          static_cast<CUmemAllocationHandleType>(kDescriptor | kFabric);
    }
    properties.allocFlags.gpuDirectRDMACapable = extras.rdma ? 1 : 0;
    CUmemGenericAllocationHandle handle = 0;
    error = driver.MemCreate(&handle, bytes, &properties, 0);
    if (error == CUDA_SUCCESS) {
      Allocation allocation(driver, handle);
      allocation.extras_ = extras;
      first_wish = wish;
      return allocation;
    }
    if (error == CUDA_ERROR_OUT_OF_MEMORY) break;
  }
  return too_little(" (" + driver.Name(error) + ")");
}

Result<Allocation> Allocation::Import(const Driver& driver, int fd) {
  CUmemGenericAllocationHandle handle = 0;
  const CUresult error = driver.MemImportFromShareableHandle(
      &handle, reinterpret_cast<void*>(static_cast<intptr_t>(fd)), kDescriptor);
  if (error == CUDA_SUCCESS) return Allocation(driver, handle);
  return Error(Code::kInvalidArgument, "no memory of a GPU: " + driver.Name(error));
}

Result<Allocation> Allocation::Under(const Driver& driver, const std::byte* at) {
  CUmemGenericAllocationHandle handle = 0;
  const CUresult error = driver.MemRetainAllocationHandle(&handle, const_cast<std::byte*>(at));
  if (error == CUDA_SUCCESS) return Allocation(driver, handle);
  return Error(Code::kInvalidArgument, "no virtual memory of a GPU: " + driver.Name(error));
}

Result<UniqueFd> Allocation::Export(const Driver& driver) const {
  int fd = -1;
  const CUresult error = driver.MemExportToShareableHandle(&fd, handle_, kDescriptor, 0);
  if (error != CUDA_SUCCESS) {
    return Error(Code::kRefused, "memory of a GPU cannot be exported: " + driver.Name(error));
  }
  UniqueFd exported(fd);
  ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  return exported;
}

}  // namespace kvrelay::cuda
