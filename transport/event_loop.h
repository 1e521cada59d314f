// What a transfer thread sleeps on: descriptors with a callback each.
#pragma once

#include <sys/epoll.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <unordered_map>

#include "base/clock.h"
#include "base/status.h"
#include "base/unique_fd.h"

namespace kvrelay::transport {

// One thread, the transfer thread. Does not own the descriptors.
class EventLoop {
 public:
  using Callback = std::function<void(uint32_t epoll_events)>;

  static Result<std::unique_ptr<EventLoop>> Create();
  // The time that Poll waits by. Any thread.
  static TimePoint Now() { return std::chrono::steady_clock::now(); }

  // Level-triggered. A descriptor is watched once; it must be unwatched before it is closed.
  // Callbacks may watch and unwatch any descriptor, their own included: a callback that was
  // unwatched does not run any more.
  Status Watch(int fd, uint32_t events, Callback callback);
  Status Change(int fd, uint32_t events);
  void Unwatch(int fd);

  // Waits until a descriptor is ready or `until` has come (nullopt: looks only), and runs the
  // callbacks of what is ready.
  void Poll(std::optional<TimePoint> until);

 private:
  struct Watched {
    uint64_t token = 0;
    std::shared_ptr<Callback> callback;
  };
  explicit EventLoop(UniqueFd epoll_fd) : epoll_fd_(std::move(epoll_fd)) {}

  UniqueFd epoll_fd_;
  uint64_t next_token_ = 1;
  std::unordered_map<int, Watched> watched_;
  // Events carry the token, so that one for a descriptor that was closed and reopened meanwhile is
  // not mistaken.
  std::unordered_map<uint64_t, int> fd_by_token_;
};

}  // namespace kvrelay::transport
