#include "base/unique_fd.h"

#include <cerrno>

namespace kvrelay {

void UniqueFd::Reset(int fd) {
  const int old = std::exchange(fd_, fd);
  if (old < 0) return;
  const int saved_errno = errno;
  // Not repeated on EINTR: Linux has released the number by then, and another thread may own it already.
  ::close(old);
  errno = saved_errno;
}

}  // namespace kvrelay
