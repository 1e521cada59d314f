#include "transport/throttle.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace kvrelay::transport {
namespace {

// Who waits for others' bytes to land, or for others to go first, looks again this soon.
constexpr Duration kLookAgain = std::chrono::microseconds(500);
// Smaller pieces cost more than they even out.
constexpr uint64_t kLeastPiece = 64 << 10;

double Earned(uint64_t bytes_per_s, Duration time) {
  return static_cast<double>(bytes_per_s) * static_cast<double>(time.count()) / 1e9;
}

}  // namespace

TimePoint Throttle::AllowedAt(uint64_t bytes, TimePoint now) {
  TimePoint at = now;
  if (caps_.bytes_per_s > 0) {
    if (now > earned_until_) {
      credit_ = std::min(credit_ + Earned(caps_.bytes_per_s, now - earned_until_),
                         Earned(caps_.bytes_per_s, kBurst));
      earned_until_ = now;
    }
    if (credit_ < 0) {
      const double wait = -credit_ * 1e9 / static_cast<double>(caps_.bytes_per_s);
      at += Duration(static_cast<int64_t>(std::ceil(std::min(wait, 1e15))));
    }
  }
  if (caps_.inflight_bytes > 0 && counts_.inflight_bytes > 0 &&
      counts_.inflight_bytes + bytes > caps_.inflight_bytes) {
    at = std::max(at, now + kLookAgain);
  }
  return at;
}

std::optional<TimePoint> Throttle::Begin(const void* who, Priority priority, uint64_t bytes,
                                         TimePoint now) {
  const std::lock_guard lock(mutex_);
  std::erase_if(waiting_, [&](const Waiting& w) { return w.who != who && w.until < now; });
  auto own = std::ranges::find(waiting_, who, &Waiting::who);
  TimePoint at = AllowedAt(bytes, now);
  bool behind = false;
  for (auto other = waiting_.begin(); other != waiting_.end(); ++other) {
    if (other == own) continue;
    behind |= other->priority > priority || (other->priority == priority && other < own);
  }
  if (behind) at = std::max(at, now + kLookAgain);
  if (at > now) {
    if (own == waiting_.end()) {
      own = waiting_.insert(own, {.who = who, .priority = priority, .since = now, .until = at});
      ++counts_.waits;
    }
    own->priority = priority;
    own->until = at + kPatience;
    return at;
  }
  if (own != waiting_.end()) {
    counts_.waited += now - own->since;
    waiting_.erase(own);
  }
  credit_ -= static_cast<double>(bytes);
  counts_.inflight_bytes += bytes;
  return std::nullopt;
}

void Throttle::End(uint64_t bytes, uint64_t moved) {
  const std::lock_guard lock(mutex_);
  credit_ += static_cast<double>(bytes) - static_cast<double>(moved);
  counts_.inflight_bytes -= bytes;
  counts_.moved_bytes += moved;
}

Throttle::Counts Throttle::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

uint64_t Gate::PieceBytes(uint64_t most) const {
  if (!throttle_) return most;
  const Caps& caps = throttle_->caps();
  if (caps.bytes_per_s > 0) {
    const double even = Earned(caps.bytes_per_s, Throttle::kBurst);
    most = std::min(most, std::max(kLeastPiece, static_cast<uint64_t>(even)));
  }
  if (caps.inflight_bytes > 0) most = std::min(most, caps.inflight_bytes);
  return most;
}

bool Gate::Begin(Priority priority, uint64_t bytes, TimePoint now) {
  if (!throttle_) return true;
  // Who was refused waits; only something more urgent asks before.
  if (retry_at_ > now && priority <= refused_) return false;
  const auto refused = throttle_->Begin(this, priority, bytes, now);
  retry_at_ = refused.value_or(TimePoint{});
  refused_ = priority;
  return !refused;
}

}  // namespace kvrelay::transport
