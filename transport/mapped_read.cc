#include "transport/mapped_read.h"

#include <utility>

namespace kvrelay::transport {

MappedRead::State MappedRead::Prepare(const Memory& memory, TimePoint now) {
  const LeaseRecord& record = memory.peer->record(guard_);
  if (!failure_.ok()) return State::kFailed;
  while (!cursor_ || cursor_->done()) {
    if (cursor_ && portions_.last()) {
      after_ = record.ReadAfter();
      return State::kDone;
    }
    Result<std::optional<CopyPlan>> plan =
        portions_.Take(record.ReadBefore(), memory.peer->bytes, memory.local_bytes, now);
    if (!plan.has_value()) {
      failure_ = std::move(plan).error();
      return State::kFailed;
    }
    if (!plan->has_value()) return State::kWaiting;
    cursor_.emplace(*std::move(*plan));
  }
  return State::kReady;
}

uint64_t MappedRead::PieceBytes(const Memory& memory, uint64_t most) const {
  return memory.device == nullptr ? most : cursor_->bytes();
}

uint64_t MappedRead::Move(const Memory& memory, uint64_t most) {
  if (memory.device == nullptr) {
    const uint64_t moved = cursor_->Step(most, memory.peer->bases, memory.local);
    bytes_ += moved;
    return moved;
  }
  Result<std::unique_ptr<DeviceCopy>> copy =
      memory.device->Copy(cursor_->plan(), memory.peer->bases, memory.local);
  if (!copy.has_value()) {
    failure_ = std::move(copy).error();
    return 0;
  }
  held_ = memory.peer;
  copying_bytes_ = cursor_->bytes();
  copy_ = *std::move(copy);
  cursor_->Skip();
  return 0;
}

bool MappedRead::LookAtCopy() {
  std::optional<Status> ended = copy_->Ended();
  if (!ended) return false;
  copy_.reset();
  held_.reset();
  if (ended->ok()) bytes_ += copying_bytes_;
  failure_ = *std::move(ended);
  return true;
}

}  // namespace kvrelay::transport
