#include "kvcache/cuda/memory_cuda.h"

#include <cuda_runtime_api.h>
#include <fcntl.h>

#include <string>

#include "kvcache/cuda/cuda_status.h"

namespace kvrelay::cuda {
namespace {

constexpr CUmemAllocationHandleType kDescriptor = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

CUmemAllocationProp PropertiesOn(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = kDescriptor;
  properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
  return properties;
}

Result<uint64_t> PageBytes(const Driver& driver, const CUmemAllocationProp& properties) {
  size_t bytes = 0;
  const CUresult error =
      driver.MemGetAllocationGranularity(&bytes, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  if (error == CUDA_SUCCESS && bytes > 0) return bytes;
  return Error(Code::kRefused,
               "cuda:" + std::to_string(properties.location.id) +
                   " has no memory that other processes can map: " + driver.Name(error));
}

uint64_t WholePages(uint64_t bytes, uint64_t page) { return (bytes + page - 1) / page * page; }

// A handle to memory. It may go when the memory is mapped.
class Handle {
 public:
  explicit Handle(const Driver& driver) : driver_(driver) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() {
    if (held_) driver_.MemRelease(value_);
  }
  CUmemGenericAllocationHandle get() const { return value_; }

  CUresult Create(uint64_t bytes, const CUmemAllocationProp& properties) {
    return Held(driver_.MemCreate(&value_, bytes, &properties, 0));
  }
  CUresult Import(int fd) {
    return Held(driver_.MemImportFromShareableHandle(
        &value_, reinterpret_cast<void*>(static_cast<intptr_t>(fd)), kDescriptor));
  }

 private:
  CUresult Held(CUresult error) {
    held_ = error == CUDA_SUCCESS;
    return error;
  }

  const Driver& driver_;
  CUmemGenericAllocationHandle value_ = 0;
  bool held_ = false;
};

}  // namespace

Result<std::pair<std::shared_ptr<const MemoryCuda>, UniqueFd>> MemoryCuda::Allocate(
    const Driver& driver, int device, uint64_t bytes) {
  CUmemAllocationProp properties = PropertiesOn(device);
  KVRELAY_ASSIGN_OR_RETURN(const uint64_t page, PageBytes(driver, properties));
  const uint64_t rounded = WholePages(bytes, page);
  size_t free_bytes = 0;
  size_t all_bytes = 0;
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaMemGetInfo(&free_bytes, &all_bytes), "free memory"));
  const auto too_little = [&](const std::string& why) {
    return Error(Code::kResourceExhausted, "not enough memory on cuda:" + std::to_string(device) +
                                               ": asked " + std::to_string(bytes) +
                                               " bytes, free " + std::to_string(free_bytes) + why);
  };
  if (rounded > free_bytes) return too_little("");
  Handle handle(driver);
  // A network card that reaches the GPU may then read it; drivers and devices without that refuse.
  properties.allocFlags.gpuDirectRDMACapable = 1;
  CUresult error = handle.Create(rounded, properties);
  if (error != CUDA_SUCCESS && error != CUDA_ERROR_OUT_OF_MEMORY) {
    properties.allocFlags.gpuDirectRDMACapable = 0;
    error = handle.Create(rounded, properties);
  }
  if (error != CUDA_SUCCESS) return too_little(" (" + driver.Name(error) + ")");
  std::shared_ptr<MemoryCuda> memory(new MemoryCuda(driver));
  KVRELAY_RETURN_IF_ERROR(
      memory->Map(handle.get(), rounded, page, device, CU_MEM_ACCESS_FLAGS_PROT_READWRITE));
  int fd = -1;
  error = driver.MemExportToShareableHandle(&fd, handle.get(), kDescriptor, 0);
  if (error != CUDA_SUCCESS) {
    return Error(Code::kRefused, "memory of cuda:" + std::to_string(device) +
                                     " cannot be exported: " + driver.Name(error));
  }
  UniqueFd exported(fd);
  ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  return std::pair(std::shared_ptr<const MemoryCuda>(std::move(memory)), std::move(exported));
}

Result<std::shared_ptr<const MemoryCuda>> MemoryCuda::Import(const Driver& driver, int device,
                                                             UniqueFd fd, uint64_t bytes) {
  KVRELAY_ASSIGN_OR_RETURN(const uint64_t page, PageBytes(driver, PropertiesOn(device)));
  Handle handle(driver);
  if (const CUresult error = handle.Import(fd.get()); error != CUDA_SUCCESS) {
    return Error(Code::kInvalidArgument, "no memory of a GPU: " + driver.Name(error));
  }
  std::shared_ptr<MemoryCuda> memory(new MemoryCuda(driver));
  KVRELAY_RETURN_IF_ERROR(memory->Map(handle.get(), WholePages(bytes, page), page, device,
                                      CU_MEM_ACCESS_FLAGS_PROT_READ));
  return std::shared_ptr<const MemoryCuda>(std::move(memory));
}

Status MemoryCuda::Map(CUmemGenericAllocationHandle handle, uint64_t rounded, uint64_t page,
                       int device, CUmemAccess_flags access) {
  const auto failure = [&](Code code, const char* what, CUresult error) {
    return Status(code, std::string(what) + " " + std::to_string(rounded) + " bytes for cuda:" +
                            std::to_string(device) + ": " + driver_.Name(error));
  };
  if (const CUresult error = driver_.MemAddressReserve(&at_, rounded, page, 0, 0);
      error != CUDA_SUCCESS) {
    return failure(Code::kResourceExhausted, "no address space: reserving", error);
  }
  reserved_ = rounded;
  // The whole of an allocation, or nothing: CUDA refuses another size.
  if (const CUresult error = driver_.MemMap(at_, rounded, 0, handle, 0); error != CUDA_SUCCESS) {
    return failure(Code::kInvalidArgument, "mapping", error);
  }
  mapped_ = true;
  const CUmemAccessDesc by{.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device},
                           .flags = access};
  if (const CUresult error = driver_.MemSetAccess(at_, rounded, &by, 1); error != CUDA_SUCCESS) {
    return failure(Code::kIncompatible, "no way to that memory: opening", error);
  }
  return {};
}

MemoryCuda::~MemoryCuda() {
  if (mapped_) driver_.MemUnmap(at_, reserved_);
  if (reserved_ > 0) driver_.MemAddressFree(at_, reserved_);
}

}  // namespace kvrelay::cuda
