// Physical memory of a GPU, by CUDA's virtual memory management: pages with no address yet.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "base/status.h"
#include "base/unique_fd.h"
#include "kvcache/cuda/driver.h"

namespace kvrelay::cuda {

// One span, ours or a peer's. It may go when it is mapped: the mapping keeps the memory. Move-only.
class Allocation {
 public:
  struct Extras {
    bool fabric = false;  // other hosts of one NVLink fabric could map it
    bool rdma = false;    // network cards could read it
  };
  // The bytes of which every size and address must be a multiple. kRefused where memory can not be
  // had that other processes can map.
  static Result<uint64_t> Granularity(const Driver& driver, int device);
  // A multiple of the granularity, with what Extras name where the driver gives it. Not zeroed.
  // kResourceExhausted with the bytes asked and free. The device is current.
  static Result<Allocation> Create(const Driver& driver, int device, uint64_t bytes);
  // What a peer exported. kInvalidArgument for what is no such memory.
  static Result<Allocation> Import(const Driver& driver, int fd);
  // What lies under an address of ours. kInvalidArgument where that is no virtual memory.
  static Result<Allocation> Under(const Driver& driver, const std::byte* at);

  Allocation(Allocation&& other) noexcept
      : release_(std::exchange(other.release_, nullptr)),
        handle_(other.handle_),
        extras_(other.extras_) {}
  Allocation& operator=(Allocation&& other) noexcept {
    std::swap(release_, other.release_);
    std::swap(handle_, other.handle_);
    std::swap(extras_, other.extras_);
    return *this;
  }
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  ~Allocation() {
    if (release_ != nullptr) release_(handle_);
  }

  CUmemGenericAllocationHandle handle() const { return handle_; }
  const Extras& extras() const { return extras_; }  // of one that was created
  // For SCM_RIGHTS, CLOEXEC.
  Result<UniqueFd> Export(const Driver& driver) const;

 private:
  Allocation(const Driver& driver, CUmemGenericAllocationHandle handle)
      : release_(driver.MemRelease), handle_(handle) {}

  decltype(&::cuMemRelease) release_;  // null: moved away
  CUmemGenericAllocationHandle handle_;
  Extras extras_;
};

}  // namespace kvrelay::cuda
