#include "kvcache/cuda/page_pool_cuda.h"

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "kvcache/cuda/cuda_status.h"

namespace kvrelay::cuda {
namespace {

Status PoolError(const Driver& driver, int device, Code code, const std::string& what,
                 CUresult error) {
  return {code, what + " for cuda:" + std::to_string(device) + ": " + driver.Name(error)};
}

CUmemAccessDesc AccessBy(int device, CUmemAccess_flags flags) {
  return {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device}, .flags = flags};
}

class PoolMapping final : public DeviceMapping {
 public:
  PoolMapping(const Driver& driver, int device, uint64_t page_bytes)
      : driver_(driver), device_(device), page_bytes_(page_bytes) {}
  ~PoolMapping() override {
    if (mapped_ > 0) driver_.MemUnmap(at_, mapped_ * page_bytes_);
    if (reserved_ > 0) driver_.MemAddressFree(at_, reserved_);
  }
  const std::byte* data() const override { return reinterpret_cast<const std::byte*>(at_); }

  Status Map(const std::vector<UniqueFd>& pages) {
    const uint64_t bytes = pages.size() * page_bytes_;
    if (const CUresult error = driver_.MemAddressReserve(&at_, bytes, page_bytes_, 0, 0);
        error != CUDA_SUCCESS) {
      return PoolError(driver_, device_, Code::kResourceExhausted, "no addresses", error);
    }
    reserved_ = bytes;
    for (const UniqueFd& fd : pages) {
      KVRELAY_ASSIGN_OR_RETURN(const Allocation page, Allocation::Import(driver_, fd.get()));
      const CUresult error =
          driver_.MemMap(at_ + mapped_ * page_bytes_, page_bytes_, 0, page.handle(), 0);
      if (error != CUDA_SUCCESS) {
        return PoolError(driver_, device_, Code::kInvalidArgument, "mapping a peer's page", error);
      }
      ++mapped_;
    }
    const CUmemAccessDesc by = AccessBy(device_, CU_MEM_ACCESS_FLAGS_PROT_READ);
    if (const CUresult error = driver_.MemSetAccess(at_, bytes, &by, 1); error != CUDA_SUCCESS) {
      return PoolError(driver_, device_, Code::kIncompatible, "no way to a peer's pages", error);
    }
    return Status::Ok();
  }

 private:
  const Driver driver_;
  const int device_;
  const uint64_t page_bytes_;
  CUdeviceptr at_ = 0;
  uint64_t reserved_ = 0;
  uint64_t mapped_ = 0;  // pages
};

}  // namespace

Result<std::unique_ptr<PagePoolCuda>> PagePoolCuda::Create(const Driver& driver, int device,
                                                           uint64_t bytes, uint64_t page_bytes) {
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(device), "choosing a GPU"));
  KVRELAY_ASSIGN_OR_RETURN(const uint64_t least, Allocation::Granularity(driver, device));
  if (page_bytes == 0 || page_bytes % least != 0) {
    return Error(Code::kInvalidArgument,
                 "pages of " + std::to_string(page_bytes) + " bytes: the driver of cuda:" +
                     std::to_string(device) + " has pages of " + std::to_string(least));
  }
  if (bytes == 0) return Error(Code::kInvalidArgument, "a virtual KV cache of 0 bytes");
  const uint64_t pages = (bytes + page_bytes - 1) / page_bytes;
  std::unique_ptr<PagePoolCuda> pool(new PagePoolCuda(driver, device, page_bytes));
  const CUresult error = driver.MemAddressReserve(&pool->at_, pages * page_bytes, page_bytes, 0, 0);
  if (error != CUDA_SUCCESS) {
    return Error(PoolError(driver, device, Code::kResourceExhausted,
                           "no addresses for " + std::to_string(pages * page_bytes) + " bytes",
                           error));
  }
  pool->under_.assign(pages, kNoPage);
  return pool;
}

PagePoolCuda::PagePoolCuda(const Driver& driver, int device, uint64_t page_bytes)
    : driver_(driver), device_(device), page_bytes_(page_bytes) {}

PagePoolCuda::~PagePoolCuda() {
  Unmap(0, under_.size());
  if (!under_.empty()) driver_.MemAddressFree(at_, bytes());
}

Status PagePoolCuda::Reserve(uint64_t pages) {
  for (uint64_t i = 0; i < pages; ++i) {
    auto page = Allocation::Create(driver_, device_, page_bytes_);
    if (!page.has_value()) {
      pool_.clear();
      free_.clear();
      return page.error().Wrap("a pool of " + std::to_string(pages) + " pages, " +
                               std::to_string(pages * page_bytes_) + " bytes");
    }
    free_.push_back(static_cast<uint32_t>(pool_.size()));
    pool_.push_back(std::move(*page));
  }
  return Status::Ok();
}

Status PagePoolCuda::Map(uint64_t first, uint64_t count) {
  if (count > free_.size()) {
    return {Code::kResourceExhausted, "asked for " + std::to_string(count) + " pages, " +
                                          std::to_string(free_.size()) + " of " +
                                          std::to_string(pool_.size()) + " are free"};
  }
  // The cache's background thread comes here, too.
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(device_), "choosing a GPU"));
  CUresult error = CUDA_SUCCESS;
  for (uint64_t page = first; page < first + count && error == CUDA_SUCCESS; ++page) {
    error = driver_.MemMap(Address(page), page_bytes_, 0, pool_[free_.back()].handle(), 0);
    if (error != CUDA_SUCCESS) break;
    under_[page] = free_.back();
    free_.pop_back();
    ++mapped_;
  }
  if (error == CUDA_SUCCESS) {
    const CUmemAccessDesc by = AccessBy(device_, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    error = driver_.MemSetAccess(Address(first), count * page_bytes_, &by, 1);
  }
  if (error == CUDA_SUCCESS) return Status::Ok();
  Unmap(first, count);
  return PoolError(driver_, device_, Code::kResourceExhausted,
                   "mapping " + std::to_string(count) + " pages", error);
}

void PagePoolCuda::Unmap(uint64_t first, uint64_t count) {
  cudaSetDevice(device_);
  for (uint64_t page = first; page < first + count; ++page) {
    if (under_[page] == kNoPage) continue;
    if (driver_.MemUnmap(Address(page), page_bytes_) != CUDA_SUCCESS) continue;
    free_.push_back(std::exchange(under_[page], kNoPage));
    --mapped_;
  }
}

Result<std::vector<UniqueFd>> PagePoolCuda::Export() const {
  std::vector<UniqueFd> pages;
  for (const Allocation& page : pool_) {
    KVRELAY_ASSIGN_OR_RETURN(UniqueFd fd, page.Export(driver_));
    pages.push_back(std::move(fd));
  }
  return pages;
}

Result<std::unique_ptr<DeviceMapping>> MapPagePool(const Driver& driver, int device,
                                                   std::vector<UniqueFd> pages,
                                                   uint64_t page_bytes) {
  if (pages.empty()) return Error(Code::kInvalidArgument, "a pool without pages");
  auto mapping = std::make_unique<PoolMapping>(driver, device, page_bytes);
  KVRELAY_RETURN_IF_ERROR(mapping->Map(pages));
  return mapping;
}

}  // namespace kvrelay::cuda
