// A GPU's pages as backing of a virtual KV cache, and peers' view of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "base/unique_fd.h"
#include "kvcache/cuda/allocation.h"
#include "kvcache/cuda/driver.h"
#include "kvcache/device.h"
#include "kvcache/page_backing.h"

namespace kvrelay::cuda {

// A range of addresses, and a pool of pages that are made once, by Reserve, and put under addresses
// and taken away from them. Each page is an allocation of its own, because CUDA maps only whole
// ones. Nothing on the device uses a page that is taken away.
class PagePoolCuda final : public PageBacking {
 public:
  // `page_bytes` must be what the driver gives, or a multiple of it (2 MiB on all devices so far):
  // kInvalidArgument names both.
  static Result<std::unique_ptr<PagePoolCuda>> Create(const Driver& driver, int device,
                                                      uint64_t bytes, uint64_t page_bytes);
  PagePoolCuda(const PagePoolCuda&) = delete;
  PagePoolCuda& operator=(const PagePoolCuda&) = delete;
  ~PagePoolCuda() override;

  std::byte* data() const override { return reinterpret_cast<std::byte*>(at_); }
  uint64_t bytes() const override { return under_.size() * page_bytes_; }
  uint64_t page_bytes() const override { return page_bytes_; }
  Status Reserve(uint64_t pages) override;
  Status Map(uint64_t first, uint64_t count) override;
  void Unmap(uint64_t first, uint64_t count) override;
  uint64_t resident_bytes() const override { return mapped_ * page_bytes_; }

  // The pool's pages, by index, for peers: once, after Reserve. Where pages are mapped here changes
  // nothing about them.
  Result<std::vector<UniqueFd>> Export() const;
  // The index of the page under these addresses; kNoPage: none.
  static constexpr uint32_t kNoPage = UINT32_MAX;
  uint32_t PoolPage(uint64_t page) const { return under_[page]; }

 private:
  PagePoolCuda(const Driver& driver, int device, uint64_t page_bytes);
  CUdeviceptr Address(uint64_t page) const { return at_ + page * page_bytes_; }

  const Driver driver_;
  const int device_;
  const uint64_t page_bytes_;
  CUdeviceptr at_ = 0;
  std::vector<uint32_t> under_;  // by page of addresses: the pool's page, or kNoPage
  std::vector<Allocation> pool_;
  std::vector<uint32_t> free_;  // of the pool
  uint64_t mapped_ = 0;         // pages
};

// A peer's pool for reading: page i lies at data() + i * page_bytes, whatever its owner has it
// under. Blocks of a pull are then named by page. Errors as Device::Map.
Result<std::unique_ptr<DeviceMapping>> MapPagePool(const Driver& driver, int device,
                                                   std::vector<UniqueFd> pages,
                                                   uint64_t page_bytes);

}  // namespace kvrelay::cuda
