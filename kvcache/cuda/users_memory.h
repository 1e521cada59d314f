// Memory of a GPU that others than this library allocated, as peers get at it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "base/unique_fd.h"
#include "kvcache/cuda/driver.h"
#include "kvcache/device.h"

namespace kvrelay::cuda {

struct UsersMemory {
  UniqueFd fd;           // for a peer's Device::Map
  std::string exported;  // what that is, for people
};

// By its descriptor where it is virtual memory, else by CUDA's IPC: then `fd` is a file that holds
// the handle of the whole allocation and where in it the memory lies. Errors as Device::Register.
// The device is current.
Result<UsersMemory> ExportUsersMemory(const Driver& driver, int device, const std::byte* data,
                                      uint64_t bytes);

// Whether it is such a file.
bool HoldsIpcHandle(int fd);
// What it names, mapped, also for writing: CUDA's IPC knows no other way. Not in the process that
// exported it. Errors as Device::Map. The device is current.
Result<std::unique_ptr<DeviceMapping>> MapIpcHandle(const Driver& driver, int device, int fd,
                                                    uint64_t bytes);

}  // namespace kvrelay::cuda
