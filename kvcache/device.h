// A GPU as code on the host sees it: memory to be registered, peers' memory mapped, the host's
// pinned, copy plans carried out. Compiles without CUDA; cuda::OpenDevice makes one
// (kvcache/cuda/device_cuda.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/status.h"
#include "base/unique_fd.h"
#include "kvcache/copy_plan.h"
#include "kvcache/region.h"

namespace kvrelay {

// A peer's device memory in this process, read-only by hardware. The destructor unmaps it; it stays
// readable until then, also when its owner has ended.
class DeviceMapping {
 public:
  virtual ~DeviceMapping() = default;
  virtual const std::byte* data() const = 0;
};

// Host memory whose pages stay where they are, so that a device's copies reach it at the host's own
// addresses. The destructor ends that, when no copy uses it any more, before the memory goes.
class PinnedHost {
 public:
  virtual ~PinnedHost() = default;
};
enum class HostAccess : uint8_t { kRead, kReadWrite };

// A plan that a device is carrying out. The destructor waits until the device touches neither side
// any more: the time of a copy.
class DeviceCopy {
 public:
  virtual ~DeviceCopy() = default;
  // How it ended; nullopt: it has not.
  virtual std::optional<Status> Ended() = 0;
};

// Any thread. Outlives everything that it made.
class Device {
 public:
  virtual ~Device() = default;

  virtual const std::string& name() const = 0;  // "cuda:0"

  // Zero-filled memory of this device that other processes on this host can map.
  // kResourceExhausted with the bytes asked and free.
  virtual Result<Region> Allocate(uint64_t bytes, const std::string& name) = 0;

  // Memory of this device that another allocated, to be mapped by others as well: by cudaMalloc,
  // which they could write then, or a whole allocation of virtual memory with a descriptor. It
  // outlives the region. kInvalidArgument, with the reason, for what others cannot map.
  virtual Result<Region> Register(std::byte* data, uint64_t bytes, const std::string& name) = 0;

  // What a peer's Device allocated or registered as `bytes` and exported, on this GPU or another of
  // this host. Takes tens of microseconds for each 2 MiB. kInvalidArgument for what is no such
  // memory; kIncompatible where this device cannot reach it.
  virtual Result<std::unique_ptr<DeviceMapping>> Map(UniqueFd fd, uint64_t bytes) = 0;

  // Lets copies use this memory of the host, mapped whole and, for kReadWrite, writable. Takes its
  // pages for good, and 35 to 55 ms a GiB. kRefused where this device cannot.
  virtual Result<std::unique_ptr<PinnedHost>> Pin(std::span<const std::byte> memory,
                                                  HostAccess access) = 0;

  // Begins to carry out a validated plan between memory that this device reaches. Nothing orders
  // copies that are under way at once.
  virtual Result<std::unique_ptr<DeviceCopy>> Copy(const CopyPlan& plan,
                                                   std::span<const std::byte* const> src_regions,
                                                   std::span<std::byte* const> dst_regions) = 0;
};

}  // namespace kvrelay
