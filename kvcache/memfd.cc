#include "kvcache/memfd.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "kvcache/available_memory.h"

// Newer than some C libraries' headers.
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

namespace kvrelay {
namespace {

constexpr size_t kMaxNameBytes = 200;  // memfd_create takes 249

}  // namespace

Status SystemError(const std::string& what, int error) {
  const bool shortage = error == ENOMEM || error == ENOSPC || error == EMFILE || error == ENFILE;
  return Error(shortage ? Code::kResourceExhausted : Code::kInternal,
               what + ": " + std::strerror(error));
}

Status NoMemory(const std::string& name, uint64_t bytes) {
  return Error(Code::kResourceExhausted, "not enough memory for region " + name + ": asked " +
                                             std::to_string(bytes) + " bytes, available " +
                                             std::to_string(AvailableMemory()));
}

Result<UniqueFd> MakeMemfd(uint64_t bytes, const std::string& name) {
  UniqueFd fd(
      ::memfd_create(name.substr(0, kMaxNameBytes).c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) return Error(SystemError("memfd_create for region " + name, errno));
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) {
    return Error(SystemError(
        "cannot size region " + name + " to " + std::to_string(bytes) + " bytes", errno));
  }
  return fd;
}

Status SealMemfd(int fd, Sealed what) {
  const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  // Linux before 5.1 does not know F_SEAL_FUTURE_WRITE. Without it the read-only descriptor still
  // guards against accidents.
  if (what == Sealed::kSizeAndPages) {
    if (::fcntl(fd, F_ADD_SEALS, seals | F_SEAL_FUTURE_WRITE) == 0) return Status::Ok();
    if (errno != EINVAL) return SystemError("cannot seal a memfd", errno);
  }
  if (::fcntl(fd, F_ADD_SEALS, seals) == 0) return Status::Ok();
  return SystemError("cannot seal a memfd", errno);
}

// A hole is a write, too: the seal forbids punching.
bool KeepsPages(int fd) {
  const int seals = ::fcntl(fd, F_GET_SEALS);
  return seals >= 0 && (seals & F_SEAL_FUTURE_WRITE) != 0;
}

Result<UniqueFd> ReopenReadOnly(int fd) {
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  UniqueFd read_only(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!read_only.valid()) {
    return Error(SystemError("cannot reopen " + path + " read-only", errno));
  }
  return read_only;
}

}  // namespace kvrelay
