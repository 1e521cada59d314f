// SIGTERM and SIGINT as events: the first asks the program to end in order, the second ends the
// process at once.
#pragma once

#include <functional>
#include <thread>

#include "base/clock.h"
#include "base/status.h"
#include "base/unique_fd.h"

namespace kvrelay::tools {

// At most one per process at a time. Created before other threads start; its destructor restores
// the default actions.
class StopSignals {
 public:
  // A second signal ends the process with `second_exit_code`, whatever the program is doing.
  static Result<StopSignals> Install(int second_exit_code);

  StopSignals(StopSignals&&) noexcept = default;
  StopSignals& operator=(StopSignals&&) = delete;
  ~StopSignals();

  // Readable once a signal has come, and from then on. For poll.
  int fd() const { return event_.get(); }
  // Waits at most that long; true once a signal has come. Any thread.
  bool Wait(Duration at_most) const;
  bool stopped() const { return Wait(Duration::zero()); }

 private:
  explicit StopSignals(UniqueFd event) : event_(std::move(event)) {}
  UniqueFd event_;
};

// Calls `stopped` once, on a thread of its own, when the first signal comes while it lives (or came
// before).
class WhenStopped {
 public:
  // `signals` outlives it.
  WhenStopped(const StopSignals& signals, std::function<void()> stopped);
  WhenStopped(const WhenStopped&) = delete;
  WhenStopped& operator=(const WhenStopped&) = delete;
  ~WhenStopped();

 private:
  UniqueFd end_;
  std::thread thread_;
};

}  // namespace kvrelay::tools
