// The control thread: timers, closures from other threads, descriptors and ZeroMQ sockets, one at a
// time in one thread.
//
// The loop spins a bounded time after the last activity (an answer within it costs about 10 us,
// waking up 40 to 110 us), then sleeps in ppoll until something happens.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/thread_checker.h"
#include "base/wake_queue.h"

struct pollfd;

namespace kvrelay::agent {

// Any thread: Now, Post, Stop. Everything else belongs to the control thread, which is the one in
// Run(); before and after Run() it is whichever thread owns the loop. Destroyed when not running;
// what was posted or timed and did not run is destroyed, not run.
class EventLoop final : public Clock {
 public:
  struct Options {
    Duration spin = std::chrono::microseconds(50);
  };
  using WatchId = uint64_t;  // 0 is never a watch
  // What a `ready` receives at most: then timers and others have their turn.
  static constexpr int kMessagesPerRound = 64;

  EventLoop() : EventLoop(Options{}) {}
  explicit EventLoop(Options options);
  ~EventLoop() override;
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;

  // Clock. Timers run in order of time, equal ones in the order in which they were set.
  TimePoint Now() const override;
  TimerId CallAt(TimePoint when, std::function<void()> fn) override;
  void Cancel(TimerId id) override;

  // Any thread. Runs on the control thread, in the order posted, never inside Post. Nothing is
  // dropped: who posts bounds how much (operations in flight).
  void Post(std::function<void()> fn);

  // `ready` runs whenever `fd` is readable, or broken, and again as long as it is.
  WatchId WatchFd(int fd, std::function<void()> ready);
  // The same for a ZeroMQ socket with messages to receive. The socket stays with the caller, who
  // calls Unwatch before closing it.
  WatchId WatchSocket(void* socket, std::function<void()> ready);
  // Unknown ids are ignored. May be called from inside any callback; `ready` does not run any more.
  void Unwatch(WatchId id);

  // Turns the calling thread into the control thread until Stop. May run again afterwards.
  void Run();
  // Not inside Run: destroys what was posted or timed and did not run, together with what that
  // holds.
  void Clear();
  // Any thread. Run returns after the callback in progress; before Run: the next Run returns at
  // once.
  void Stop();

 private:
  struct Watch;
  using TimerKey = std::pair<TimePoint, TimerId>;

  WatchId AddWatch(std::unique_ptr<Watch> watch);
  // Each returns whether it ran anything.
  bool RunPosted();
  bool RunTimers();
  bool RunSockets();
  bool RunDescriptors(bool may_sleep);

  const Duration spin_;
  ThreadChecker control_thread_;

  WakeQueue<std::function<void()>> posted_;
  std::vector<std::function<void()>> batch_;  // taken from posted_
  std::atomic<bool> stop_{false};

  TimerId next_timer_ = 1;
  std::map<TimerKey, std::function<void()>> timers_;
  std::unordered_map<TimerId, TimePoint> timer_times_;  // the keys of timers_, by id

  WatchId next_watch_ = 1;
  // Shared, so that a callback may remove its own watch; `removed` ones are erased between rounds.
  std::vector<std::shared_ptr<Watch>> watches_;
  std::vector<pollfd> polled_;  // first posted_'s descriptor, then one per watch
};

}  // namespace kvrelay::agent
