#include "agent/event_loop.h"

#include <glog/logging.h>
#include <poll.h>
#include <zmq.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

namespace kvrelay::agent {

struct EventLoop::Watch {
  WatchId id = 0;
  int fd = -1;             // of the socket too: readable when its state may have changed
  void* socket = nullptr;  // null: a plain descriptor
  std::function<void()> ready;
  bool removed = false;
};

EventLoop::EventLoop(Options options) : spin_(options.spin), posted_(SIZE_MAX) {}

EventLoop::~EventLoop() { Clear(); }

// What closures hold may post or set timers again when it dies.
void EventLoop::Clear() {
  std::vector<std::function<void()>> posted;
  while (posted_.DrainInto(posted) > 0 || !timers_.empty()) {
    timer_times_.clear();
    const auto timers = std::exchange(timers_, {});
    posted.clear();
  }
}

TimePoint EventLoop::Now() const { return std::chrono::steady_clock::now(); }

Clock::TimerId EventLoop::CallAt(TimePoint when, std::function<void()> fn) {
  KVRELAY_DCHECK_THREAD(control_thread_);
  const TimerId id = next_timer_++;
  timers_.emplace(TimerKey{when, id}, std::move(fn));
  timer_times_.emplace(id, when);
  return id;
}

void EventLoop::Cancel(TimerId id) {
  KVRELAY_DCHECK_THREAD(control_thread_);
  const auto it = timer_times_.find(id);
  if (it == timer_times_.end()) return;
  // Taken out first: what the function holds may call us when it dies.
  auto node = timers_.extract(TimerKey{it->second, id});
  timer_times_.erase(it);
}

void EventLoop::Post(std::function<void()> fn) {
  CHECK(posted_.Push(std::move(fn)));  // its capacity is SIZE_MAX
}

EventLoop::WatchId EventLoop::AddWatch(std::unique_ptr<Watch> watch) {
  KVRELAY_DCHECK_THREAD(control_thread_);
  watch->id = next_watch_++;
  watches_.push_back(std::move(watch));
  return watches_.back()->id;
}

EventLoop::WatchId EventLoop::WatchFd(int fd, std::function<void()> ready) {
  auto watch = std::make_unique<Watch>();
  watch->fd = fd;
  watch->ready = std::move(ready);
  return AddWatch(std::move(watch));
}

EventLoop::WatchId EventLoop::WatchSocket(void* socket, std::function<void()> ready) {
  auto watch = std::make_unique<Watch>();
  watch->socket = socket;
  size_t size = sizeof(watch->fd);
  const int rc = zmq_getsockopt(socket, ZMQ_FD, &watch->fd, &size);
  CHECK_EQ(rc, 0) << "ZMQ_FD: " << zmq_strerror(zmq_errno());
  watch->ready = std::move(ready);
  return AddWatch(std::move(watch));
}

void EventLoop::Unwatch(WatchId id) {
  KVRELAY_DCHECK_THREAD(control_thread_);
  for (const auto& watch : watches_) {
    if (watch->id == id) watch->removed = true;
  }
}

void EventLoop::Run() {
  control_thread_.Detach();
  KVRELAY_DCHECK_THREAD(control_thread_);
  TimePoint spin_until = Now() + spin_;
  while (!stop_.load(std::memory_order_acquire)) {
    bool active = RunPosted();
    active |= RunTimers();
    // Sockets come last before sleeping: their descriptors only tell of changes, so that state must
    // be looked at after the last use of a socket, not only when ppoll says so.
    active |= RunSockets();
    active |= RunDescriptors(/*may_sleep=*/!active && Now() >= spin_until);
    if (active) spin_until = Now() + spin_;
  }
  stop_.store(false, std::memory_order_relaxed);
  control_thread_.Detach();
}

void EventLoop::Stop() {
  stop_.store(true, std::memory_order_release);
  Post([] {});  // wakes the loop
}

bool EventLoop::RunPosted() {
  if (posted_.ApproximateSize() == 0) return false;
  posted_.DrainInto(batch_);
  // Closures run out of the member: one of them may run a nested destructor that posts, never one
  // that runs the loop.
  for (auto& fn : batch_) {
    fn();
    fn = nullptr;
  }
  batch_.clear();
  return true;
}

bool EventLoop::RunTimers() {
  if (timers_.empty()) return false;
  const TimePoint now = Now();
  // Chosen first: a timer that sets another one for now does not keep the loop from everything
  // else.
  std::vector<TimerKey> due;
  for (const auto& [key, fn] : timers_) {
    if (key.first > now) break;
    due.push_back(key);
  }
  for (const TimerKey& key : due) {
    auto node = timers_.extract(key);
    if (node.empty()) continue;  // cancelled by one before it
    timer_times_.erase(key.second);
    node.mapped()();
  }
  return !due.empty();
}

bool EventLoop::RunSockets() {
  bool active = false;
  // By index: callbacks may add watches.
  for (size_t i = 0; i < watches_.size(); ++i) {
    const std::shared_ptr<Watch> watch = watches_[i];
    if (watch->removed || watch->socket == nullptr) continue;
    int events = 0;
    size_t size = sizeof(events);
    if (zmq_getsockopt(watch->socket, ZMQ_EVENTS, &events, &size) != 0)
      continue;  // EINTR: next round
    if ((events & ZMQ_POLLIN) == 0) continue;
    watch->ready();
    active = true;
  }
  std::erase_if(watches_, [](const auto& watch) { return watch->removed; });
  return active;
}

bool EventLoop::RunDescriptors(bool may_sleep) {
  polled_.clear();
  polled_.push_back({posted_.fd(), POLLIN, 0});
  for (const auto& watch : watches_) polled_.push_back({watch->fd, POLLIN, 0});

  timespec wait{};
  const timespec* timeout = &wait;
  if (may_sleep) {
    if (timers_.empty()) {
      timeout = nullptr;
    } else {
      const Duration left = std::max(timers_.begin()->first.first - Now(), Duration::zero());
      wait.tv_sec = std::chrono::duration_cast<std::chrono::seconds>(left).count();
      wait.tv_nsec = (left % std::chrono::seconds(1)).count();
    }
  }
  const int ready = ppoll(polled_.data(), polled_.size(), timeout, nullptr);
  if (ready < 0) {
    CHECK(errno == EINTR || errno == EAGAIN) << "ppoll: " << std::strerror(errno);
    return false;
  }
  if (ready == 0) return false;
  const size_t count = polled_.size() - 1;  // callbacks may add watches
  bool active = polled_[0].revents != 0;
  for (size_t i = 0; i < count; ++i) {
    const std::shared_ptr<Watch> watch = watches_[i];
    if (polled_[i + 1].revents == 0) continue;
    active = true;  // a socket's events are looked at in the next round
    if (!watch->removed && watch->socket == nullptr) watch->ready();
  }
  return active;
}

}  // namespace kvrelay::agent
