#include "base/unique_fd.h"

#include <cerrno>

namespace kvrelay {

void UniqueFd::Reset(int fd) {
  const int old = std::exchange(fd_, fd);
  if (old < 0) return;
  const int saved_errno = errno;
  // Not repeated on EINTR: the number is free by then, and another thread may own it already.
  ::close(old);
  errno = saved_errno;
}

}  // namespace kvrelay
