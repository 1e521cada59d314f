// Spans of a GPU's memory by CUDA's virtual memory management: ours, which others can map, and
// others', mapped read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/status.h"
#include "base/unique_fd.h"
#include "kvcache/cuda/allocation.h"
#include "kvcache/cuda/driver.h"

namespace kvrelay::cuda {

// Address space of whole pages with memory behind all of it. Unmaps in its destructor. The thread
// that makes one has the device current.
class MemoryCuda {
 public:
  struct Exported {
    std::shared_ptr<const MemoryCuda> memory;
    UniqueFd fd;
    Allocation::Extras extras;
  };
  // Reads and writes of `device`, with a descriptor for others; not zeroed. kResourceExhausted.
  static Result<Exported> Allocate(const Driver& driver, int device, uint64_t bytes);
  // Reads of `device`. Errors as Device::Map.
  static Result<std::shared_ptr<const MemoryCuda>> Import(const Driver& driver, int device,
                                                          UniqueFd fd, uint64_t bytes);
  MemoryCuda(const MemoryCuda&) = delete;
  MemoryCuda& operator=(const MemoryCuda&) = delete;
  ~MemoryCuda();

  std::byte* data() const { return reinterpret_cast<std::byte*>(at_); }

 private:
  explicit MemoryCuda(const Driver& driver) : driver_(driver) {}
  // `rounded` bytes of `handle`, for `device`.
  Status Map(CUmemGenericAllocationHandle handle, uint64_t rounded, uint64_t page, int device,
             CUmemAccess_flags access);

  const Driver driver_;
  CUdeviceptr at_ = 0;
  uint64_t reserved_ = 0;
  bool mapped_ = false;
};

}  // namespace kvrelay::cuda
