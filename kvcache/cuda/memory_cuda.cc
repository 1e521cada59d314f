#include "kvcache/cuda/memory_cuda.h"

#include <string>
#include <utility>

namespace kvrelay::cuda {
namespace {

uint64_t WholePages(uint64_t bytes, uint64_t page) { return (bytes + page - 1) / page * page; }

}  // namespace

Result<MemoryCuda::Exported> MemoryCuda::Allocate(const Driver& driver, int device,
                                                  uint64_t bytes) {
  KVRELAY_ASSIGN_OR_RETURN(const uint64_t page, Allocation::Granularity(driver, device));
  const uint64_t rounded = WholePages(bytes, page);
  KVRELAY_ASSIGN_OR_RETURN(const Allocation allocation,
                           Allocation::Create(driver, device, rounded));
  std::shared_ptr<MemoryCuda> memory(new MemoryCuda(driver));
  KVRELAY_RETURN_IF_ERROR(
      memory->Map(allocation.handle(), rounded, page, device, CU_MEM_ACCESS_FLAGS_PROT_READWRITE));
  KVRELAY_ASSIGN_OR_RETURN(UniqueFd exported, allocation.Export(driver));
  return Exported{std::move(memory), std::move(exported), allocation.extras()};
}

Result<std::shared_ptr<const MemoryCuda>> MemoryCuda::Import(const Driver& driver, int device,
                                                             UniqueFd fd, uint64_t bytes) {
  KVRELAY_ASSIGN_OR_RETURN(const uint64_t page, Allocation::Granularity(driver, device));
  KVRELAY_ASSIGN_OR_RETURN(const Allocation allocation, Allocation::Import(driver, fd.get()));
  std::shared_ptr<MemoryCuda> memory(new MemoryCuda(driver));
  KVRELAY_RETURN_IF_ERROR(memory->Map(allocation.handle(), WholePages(bytes, page), page, device,
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
