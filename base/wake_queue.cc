#include "base/wake_queue.h"

#include <glog/logging.h>
#include <sys/eventfd.h>

#include <cerrno>

namespace kvrelay::internal {

UniqueFd MakeEventFd() {
  UniqueFd fd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  PCHECK(fd.valid()) << "eventfd";
  return fd;
}

void SignalEventFd(int fd) {
  const uint64_t one = 1;
  // EAGAIN: the counter is full, so that the descriptor is readable already.
  while (::write(fd, &one, sizeof(one)) < 0 && errno == EINTR) {
  }
}

void ClearEventFd(int fd) {
  uint64_t count = 0;
  while (::read(fd, &count, sizeof(count)) < 0 && errno == EINTR) {
  }
}

}  // namespace kvrelay::internal
