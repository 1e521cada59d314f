// What bounds the bytes that the transports of a process move.
//
// Every byte counts once, where it is moved: a read one-sided at the reader, a packed stream's at
// the owner.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/priority.h"

namespace kvrelay::transport {

struct Caps {
  uint64_t bytes_per_s = 0;     // 0: as fast as it goes
  uint64_t inflight_bytes = 0;  // begun and not ended; 0: as many as it likes

  bool any() const { return bytes_per_s > 0 || inflight_bytes > 0; }
};

// Shared by the transports of all ranks. Any thread. Time is the callers'.
//
// In any time t at most bytes_per_s * t, what a burst is (kBurst of the rate), and one piece begin;
// pieces in flight are never more than inflight_bytes, except one alone that is larger.
class Throttle {
 public:
  static constexpr Duration kBurst = Millis(10);
  // Who was refused asks again in this time, or has given up its place.
  static constexpr Duration kPatience = Millis(2);

  explicit Throttle(Caps caps) : caps_(caps) {}

  const Caps& caps() const { return caps_; }

  // Whether `who` may begin a piece of up to `bytes` now: nothing, and it counts until End. Else
  // when to ask again. Of those that wait the more urgent go first, then who has waited longer.
  std::optional<TimePoint> Begin(const void* who, Priority priority, uint64_t bytes, TimePoint now);
  // The piece has ended and moved `moved` of its `bytes`; the rest counts for nothing.
  void End(uint64_t bytes, uint64_t moved);

  struct Counts {
    uint64_t inflight_bytes = 0;  // now
    uint64_t moved_bytes = 0;     // of ended pieces
    uint64_t waits = 0;           // pieces that could not begin at once
    Duration waited{};            // by them, together
  };
  Counts counts() const;

 private:
  struct Waiting {
    const void* who = nullptr;
    Priority priority = Priority::kPrefetch;
    TimePoint since;
    TimePoint until;  // it has asked again by then, or is gone
  };

  // When the caps allow it, whoever else waits; `now` when they do.
  TimePoint AllowedAt(uint64_t bytes, TimePoint now);

  const Caps caps_;
  mutable std::mutex mutex_;
  // All under the mutex.
  TimePoint earned_until_;        // up to when the rate was counted
  double credit_ = 0;             // bytes; below 0 while what began is not earned
  std::vector<Waiting> waiting_;  // in the order in which they came
  Counts counts_;
};

// A transport's end of it. One thread.
class Gate {
 public:
  // Null: nothing is bounded.
  explicit Gate(std::shared_ptr<Throttle> throttle) : throttle_(std::move(throttle)) {}

  bool bounded() const { return throttle_ != nullptr; }
  // The largest piece, up to `most`, that moves evenly under the caps.
  uint64_t PieceBytes(uint64_t most) const;
  // As the throttle's. False: ask again at retry_at().
  bool Begin(Priority priority, uint64_t bytes, TimePoint now);
  // Makes room: who was refused may ask again at once.
  void End(uint64_t bytes, uint64_t moved) {
    if (!throttle_ || (bytes == 0 && moved == 0)) return;
    throttle_->End(bytes, moved);
    retry_at_ = {};
  }
  // When to ask again, at the time of the refusal; max() when nothing was refused.
  TimePoint retry_at(TimePoint now) const { return retry_at_ > now ? retry_at_ : TimePoint::max(); }

 private:
  const std::shared_ptr<Throttle> throttle_;
  TimePoint retry_at_;
  Priority refused_ = Priority::kPrefetch;
};

}  // namespace kvrelay::transport
