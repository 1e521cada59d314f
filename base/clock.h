// Time as the protocol sees it: a monotonic now, and calls later. Real processes drive it from the
// control thread's event loop; tests/sim drives it in virtual time, which is why protocol logic
// uses nothing else.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>

namespace kvrelay {

using Duration = std::chrono::nanoseconds;
// Monotonic, per host; never sent to another process (durations are, on the owner's clock).
using TimePoint = std::chrono::time_point<std::chrono::steady_clock, Duration>;

constexpr double ToMillis(Duration d) {
  return std::chrono::duration<double, std::milli>(d).count();
}
constexpr Duration Millis(int64_t ms) { return std::chrono::milliseconds(ms); }

class Clock {
 public:
  using TimerId = uint64_t;  // 0 is never a timer

  virtual ~Clock() = default;
  // Any thread.
  virtual TimePoint Now() const = 0;
  // Control thread only. `fn` runs once on the control thread at or after `when`, unless cancelled
  // before.
  virtual TimerId CallAt(TimePoint when, std::function<void()> fn) = 0;
  // Control thread only. Cancelling 0, or a timer that ran, does nothing.
  virtual void Cancel(TimerId id) = 0;

  TimerId CallAfter(Duration delay, std::function<void()> fn) {
    return CallAt(Now() + delay, std::move(fn));
  }
};

}  // namespace kvrelay
