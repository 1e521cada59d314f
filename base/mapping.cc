#include "base/mapping.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <string>

namespace kvrelay {

Result<Mapping> Mapping::Map(size_t bytes, int protection, int flags, int fd, int64_t offset) {
  if (bytes == 0) return Error(Code::kInvalidArgument, "a mapping needs at least one byte");
  void* address = ::mmap(nullptr, bytes, protection, flags, fd, offset);
  if (address == MAP_FAILED) {
    const int error = errno;
    // EAGAIN: the locked-memory limit.
    const Code code =
        error == ENOMEM || error == EAGAIN ? Code::kResourceExhausted : Code::kInternal;
    return Error(code, "cannot map " + std::to_string(bytes) + " bytes: " + std::strerror(error));
  }
  return Mapping(static_cast<std::byte*>(address), bytes);
}

void Mapping::Reset() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace kvrelay
