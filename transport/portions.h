// What an optimistic read may read, and when: its portions, asked for under the guard words just
// read, checked, and waited for while there are none.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <utility>

#include "base/clock.h"
#include "base/status.h"
#include "kvcache/copy_plan.h"
#include "kvcache/lease_record.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// One thread at a time.
class Portions {
 public:
  explicit Portions(NextPortion next) : next_(std::move(next)) {}

  // The plan of the next portion, empty at most when it is the last one; nullopt when nothing may
  // be read before poll_at(). An error ends the read: there is to be no portion, or it leaves the
  // regions (kInvalidArgument).
  Result<std::optional<CopyPlan>> Take(const GuardWords& before,
                                       std::span<const uint64_t> peer_bytes,
                                       std::span<const uint64_t> local_bytes, TimePoint now);

  // After Take. What it was given.
  const GuardWords& before() const { return before_; }
  // Nothing comes after what it returned.
  bool last() const { return last_; }
  TimePoint poll_at() const { return poll_at_; }

 private:
  const NextPortion next_;
  GuardWords before_;
  bool last_ = false;
  std::optional<TimePoint> waiting_since_;
  TimePoint poll_at_;
};

}  // namespace kvrelay::transport
