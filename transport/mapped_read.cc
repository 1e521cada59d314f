#include "transport/mapped_read.h"

#include <utility>

namespace kvrelay::transport {

MappedRead::State MappedRead::Step(const Memory& memory, TimePoint now) {
  const auto* record =
      reinterpret_cast<const LeaseRecord*>(memory.peer[guard_.region] + guard_.offset);
  if (!cursor_) {
    before_ = record->ReadBefore();
    Result<Portion> portion = next_(before_);
    if (portion.has_value()) {
      failure_ = portion->plan.Validate(memory.peer_bytes, memory.local_bytes);
    } else {
      failure_ = portion.error();
    }
    if (!failure_.ok()) return State::kFailed;
    last_ = portion->last;
    cursor_.emplace(std::move(portion->plan));
    if (cursor_->done() && !last_) {
      cursor_.reset();
      if (!waiting_since_) waiting_since_ = now;
      poll_at_ = now + PollPause(now - *waiting_since_);
      return State::kWaiting;
    }
    waiting_since_.reset();
  }
  if (!cursor_->done()) bytes_ += cursor_->Step(kStepBytes, memory.peer, memory.local);
  if (!cursor_->done()) return State::kBusy;
  cursor_.reset();
  if (!last_) return State::kBusy;
  after_ = record->ReadAfter();
  return State::kDone;
}

}  // namespace kvrelay::transport
