#include "transport/event_loop.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

namespace kvrelay::transport {

Result<std::unique_ptr<EventLoop>> EventLoop::Create() {
  UniqueFd fd(epoll_create1(EPOLL_CLOEXEC));
  if (!fd) {
    return Error(Code::kResourceExhausted, std::string("epoll_create1: ") + std::strerror(errno));
  }
  return std::unique_ptr<EventLoop>(new EventLoop(std::move(fd)));
}

Status EventLoop::Watch(int fd, uint32_t events, Callback callback) {
  const uint64_t token = next_token_++;
  epoll_event event{};
  event.events = events;
  event.data.u64 = token;
  if (epoll_ctl(epoll_fd_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    return Error(Code::kResourceExhausted, std::string("epoll_ctl(ADD): ") + std::strerror(errno));
  }
  watched_[fd] = {token, std::make_shared<Callback>(std::move(callback))};
  fd_by_token_[token] = fd;
  return {};
}

Status EventLoop::Change(int fd, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = watched_.at(fd).token;
  if (epoll_ctl(epoll_fd_.get(), EPOLL_CTL_MOD, fd, &event) != 0) {
    return Error(Code::kInternal, std::string("epoll_ctl(MOD): ") + std::strerror(errno));
  }
  return {};
}

void EventLoop::Unwatch(int fd) {
  const auto it = watched_.find(fd);
  if (it == watched_.end()) return;
  epoll_ctl(epoll_fd_.get(), EPOLL_CTL_DEL, fd, nullptr);
  fd_by_token_.erase(it->second.token);
  watched_.erase(it);
}

void EventLoop::Poll(std::optional<TimePoint> until) {
  int timeout_ms = 0;
  if (until.has_value()) {
    const auto wait = *until - Now();
    // Rounded up: waking before the time would spin until it comes.
    const int64_t ms = std::chrono::ceil<std::chrono::milliseconds>(wait).count();
    timeout_ms = ms <= 0 ? 0 : static_cast<int>(std::min<int64_t>(ms, 60'000));
  }
  epoll_event events[32];
  const int count = epoll_wait(epoll_fd_.get(), events, std::size(events), timeout_ms);
  for (int i = 0; i < count; ++i) {
    const auto it = fd_by_token_.find(events[i].data.u64);
    if (it == fd_by_token_.end()) continue;
    // Held here: the callback may unwatch itself.
    const std::shared_ptr<Callback> callback = watched_.at(it->second).callback;
    (*callback)(events[i].events);
  }
}

}  // namespace kvrelay::transport
