#include "tools/common/stop_signals.h"

#include <glog/logging.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>

namespace kvrelay::tools {
namespace {

// Lock-free atomics only: they are all that a signal handler may touch.
std::atomic<int> event_fd{-1};
std::atomic<int> signals_seen{0};
std::atomic<int> exit_code_of_second{1};

void OnSignal(int /*signal*/) {
  const int saved_errno = errno;
  if (signals_seen.fetch_add(1) > 0) ::_exit(exit_code_of_second.load());
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(event_fd.load(), &one, sizeof(one));
  errno = saved_errno;
}

}  // namespace

Result<StopSignals> StopSignals::Install(int second_exit_code) {
  UniqueFd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (event.get() < 0) {
    return Error(Code::kResourceExhausted, std::string("eventfd: ") + std::strerror(errno));
  }
  exit_code_of_second = second_exit_code;
  signals_seen = 0;
  event_fd = event.get();
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  for (const int signal : {SIGTERM, SIGINT}) {
    if (::sigaction(signal, &action, nullptr) != 0) {
      return Error(Code::kInternal, std::string("sigaction: ") + std::strerror(errno));
    }
  }
  return StopSignals(std::move(event));
}

StopSignals::~StopSignals() {
  if (event_.get() < 0) return;
  std::signal(SIGTERM, SIG_DFL);
  std::signal(SIGINT, SIG_DFL);
  event_fd = -1;
}

bool StopSignals::Wait(Duration at_most) const {
  // A signal interrupts poll, also when SA_RESTART is set: ask again for the rest of the time.
  const auto until = std::chrono::steady_clock::now() + at_most;
  for (;;) {
    pollfd waiting = {.fd = event_.get(), .events = POLLIN, .revents = 0};
    const auto left =
        std::chrono::ceil<std::chrono::milliseconds>(until - std::chrono::steady_clock::now());
    const int ready = ::poll(&waiting, 1, static_cast<int>(std::max<int64_t>(left.count(), 0)));
    if (ready > 0) return true;
    if (ready == 0 || errno != EINTR) return false;
  }
}

WhenStopped::WhenStopped(const StopSignals& signals, std::function<void()> stopped)
    : end_(::eventfd(0, EFD_CLOEXEC)) {
  CHECK(end_.valid()) << "eventfd: " << std::strerror(errno);
  thread_ = std::thread([signal = signals.fd(), end = end_.get(), stopped = std::move(stopped)] {
    std::array<pollfd, 2> waiting = {{{.fd = signal, .events = POLLIN, .revents = 0},
                                      {.fd = end, .events = POLLIN, .revents = 0}}};
    while (::poll(waiting.data(), waiting.size(), -1) < 0 && errno == EINTR) {
    }
    if (waiting[0].revents != 0 && waiting[1].revents == 0) stopped();
  });
}

WhenStopped::~WhenStopped() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(end_.get(), &one, sizeof(one));
  thread_.join();
}

}  // namespace kvrelay::tools
