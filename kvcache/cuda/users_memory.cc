#include "kvcache/cuda/users_memory.h"

#include <cuda_runtime_api.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <optional>
#include <utility>

#include "kvcache/cuda/allocation.h"
#include "kvcache/memfd.h"

namespace kvrelay::cuda {
namespace {

struct IpcFile {
  static constexpr uint64_t kMagic = 0x31435049'52564bULL;  // "KVRIPC1"

  uint64_t magic = 0;
  uint64_t offset = 0;  // of the memory in its allocation
  cudaIpcMemHandle_t handle = {};
};

std::optional<IpcFile> ReadIpcFile(int fd) {
  struct stat info = {};
  IpcFile file;
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size != sizeof(file) ||
      ::pread(fd, &file, sizeof(file), 0) != sizeof(file) || file.magic != IpcFile::kMagic) {
    return std::nullopt;
  }
  return file;
}

Result<UniqueFd> MakeIpcFile(const IpcFile& file) {
  KVRELAY_ASSIGN_OR_RETURN(const UniqueFd fd, MakeMemfd(sizeof(file), "kvrelay-ipc-handle"));
  if (::pwrite(fd.get(), &file, sizeof(file), 0) != sizeof(file)) {
    return Error(SystemError("writing a handle", errno));
  }
  KVRELAY_RETURN_IF_ERROR(SealMemfd(fd.get(), Sealed::kSizeAndPages));
  return ReopenReadOnly(fd.get());
}

class IpcMapping final : public DeviceMapping {
 public:
  IpcMapping(int device, void* base, uint64_t offset)
      : device_(device), base_(base), offset_(offset) {}
  ~IpcMapping() override {
    cudaSetDevice(device_);
    cudaIpcCloseMemHandle(base_);
  }
  const std::byte* data() const override { return static_cast<const std::byte*>(base_) + offset_; }

 private:
  const int device_;
  void* const base_;
  const uint64_t offset_;
};

}  // namespace

Result<UsersMemory> ExportUsersMemory(const Driver& driver, int device, const std::byte* data,
                                      uint64_t bytes) {
  const auto refuse = [&](const std::string& why) {
    return Error(Code::kInvalidArgument,
                 std::to_string(bytes) + " bytes of cuda:" + std::to_string(device) + ": " + why);
  };
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, data) != cudaSuccess ||
      attributes.type != cudaMemoryTypeDevice || attributes.device != device) {
    return refuse("this is no memory of that GPU");
  }
  CUdeviceptr base = 0;
  size_t whole = 0;
  const auto at = reinterpret_cast<CUdeviceptr>(data);
  if (const CUresult error = driver.MemGetAddressRange(&base, &whole, at); error != CUDA_SUCCESS) {
    return refuse("the driver does not know them: " + driver.Name(error));
  }
  if (bytes == 0 || at - base > whole || bytes > whole - (at - base)) {
    return refuse("they are not inside one allocation, which has " + std::to_string(whole) +
                  " bytes");
  }
  if (const auto allocation = Allocation::Under(driver, data); allocation.has_value()) {
    KVRELAY_ASSIGN_OR_RETURN(const uint64_t page, Allocation::Granularity(driver, device));
    if (at != base || (bytes + page - 1) / page * page != whole) {
      return refuse("virtual memory is mapped by others as a whole, and its allocation has " +
                    std::to_string(whole) + " bytes, from " + std::to_string(at - base) +
                    " bytes before them on");
    }
    auto fd = allocation->Export(driver);
    if (!fd.has_value()) {
      return refuse("it was allocated without a POSIX descriptor for others (" +
                    fd.error().message() + ")");
    }
    return UsersMemory{*std::move(fd), "CUDA virtual memory"};
  }
  IpcFile file{.magic = IpcFile::kMagic, .offset = at - base};
  if (const cudaError_t error = cudaIpcGetMemHandle(&file.handle, reinterpret_cast<void*>(base));
      error != cudaSuccess) {
    (void)cudaGetLastError();
    return refuse(std::string("it is neither cudaMalloc's nor virtual memory: ") +
                  cudaGetErrorString(error));
  }
  KVRELAY_ASSIGN_OR_RETURN(UniqueFd fd, MakeIpcFile(file));
  return UsersMemory{std::move(fd), "CUDA IPC (peers could write)"};
}

bool HoldsIpcHandle(int fd) { return ReadIpcFile(fd).has_value(); }

Result<std::unique_ptr<DeviceMapping>> MapIpcHandle(const Driver& driver, int device, int fd,
                                                    uint64_t bytes) {
  const std::optional<IpcFile> file = ReadIpcFile(fd);
  if (!file) return Error(Code::kInvalidArgument, "no handle of CUDA's IPC");
  void* base = nullptr;
  if (const cudaError_t error =
          cudaIpcOpenMemHandle(&base, file->handle, cudaIpcMemLazyEnablePeerAccess);
      error != cudaSuccess) {
    (void)cudaGetLastError();
    return Error(
        error == cudaErrorPeerAccessUnsupported ? Code::kIncompatible : Code::kInvalidArgument,
        std::string("opening a handle of CUDA's IPC: ") + cudaGetErrorString(error));
  }
  auto mapping = std::make_unique<IpcMapping>(device, base, file->offset);
  CUdeviceptr begin = 0;
  size_t whole = 0;
  if (driver.MemGetAddressRange(&begin, &whole, reinterpret_cast<CUdeviceptr>(base)) !=
          CUDA_SUCCESS ||
      file->offset > whole || bytes > whole - file->offset) {
    return Error(Code::kInvalidArgument,
                 std::to_string(bytes) + " bytes were announced, the allocation has " +
                     std::to_string(whole) + ", they begin after " + std::to_string(file->offset));
  }
  return mapping;
}

}  // namespace kvrelay::cuda
