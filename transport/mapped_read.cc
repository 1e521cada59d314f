#include "transport/mapped_read.h"

#include <utility>

namespace kvrelay::transport {

MappedRead::State MappedRead::Step(const Memory& memory, TimePoint now, uint64_t max_bytes) {
  const auto* record =
      reinterpret_cast<const LeaseRecord*>(memory.peer[guard_.region] + guard_.offset);
  if (!cursor_) {
    Result<std::optional<CopyPlan>> plan =
        portions_.Take(record->ReadBefore(), memory.peer_bytes, memory.local_bytes, now);
    if (!plan.has_value()) {
      failure_ = std::move(plan).error();
      return State::kFailed;
    }
    if (!plan->has_value()) return State::kWaiting;
    cursor_.emplace(*std::move(*plan));
  }
  if (!cursor_->done()) bytes_ += cursor_->Step(max_bytes, memory.peer, memory.local);
  if (!cursor_->done()) return State::kBusy;
  cursor_.reset();
  if (!portions_.last()) return State::kBusy;
  after_ = record->ReadAfter();
  return State::kDone;
}

}  // namespace kvrelay::transport
