#include "transport/get_read.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

namespace kvrelay::transport {

GetRead::State GetRead::Step(GetWay& way, TimePoint now, uint64_t max_bytes) {
  if (gets_.failure != UCS_OK) {
    failure_ = Status(Code::kPeerUnreachable,
                      std::string("a one-sided read failed: ") + ucs_status_string(gets_.failure));
    return State::kFailed;
  }
  switch (stage_) {
    case Stage::kStart:
      GetGuard(way, Stage::kBefore);
      return State::kBusy;
    case Stage::kBefore:
      if (gets_.in_flight > 0) return State::kInFlight;
      return BeginPortion(way, now, max_bytes);
    case Stage::kPause:
      if (now < poll_at()) return State::kWaiting;
      GetGuard(way, Stage::kBefore);
      return State::kBusy;
    case Stage::kData:
      return PostRuns(way, max_bytes);
    case Stage::kAfter:
      if (gets_.in_flight > 0) return State::kInFlight;
      after_ = TakeGuard();
      return State::kDone;
  }
  return State::kFailed;
}

void GetRead::GetGuard(GetWay& way, Stage stage) {
  way.Get(guard_.region, guard_.offset, {local_.guard, sizeof(GuardWords)}, *local_.guard_memory,
          &gets_);
  stage_ = stage;
}

// The library has said that the words are here. What it reads later was asked for later: it is not
// older than they are. Each word is whole, their order is not known: ARCHITECTURE section 5 says
// why that is enough.
GuardWords GetRead::TakeGuard() const {
  std::atomic_thread_fence(std::memory_order_acquire);
  GuardWords words;
  std::memcpy(&words, local_.guard, sizeof(words));
  return words;
}

GetRead::State GetRead::BeginPortion(GetWay& way, TimePoint now, uint64_t max_bytes) {
  Result<std::optional<CopyPlan>> plan =
      portions_.Take(TakeGuard(), way.region_bytes(), local_.region_bytes, now);
  if (!plan.has_value()) {
    failure_ = std::move(plan).error();
    return State::kFailed;
  }
  if (!plan->has_value()) {
    stage_ = Stage::kPause;
    return State::kWaiting;
  }
  if (std::ranges::any_of((*plan)->boxes, [](const CopyBox& box) { return box.casts; })) {
    failure_ = Status(Code::kIncompatible, "a one-sided read moves bytes, it can not cast them");
    return State::kFailed;
  }
  runs_.emplace(*std::move(*plan));
  posted_all_ = false;
  stage_ = Stage::kData;
  return PostRuns(way, max_bytes);
}

GetRead::State GetRead::PostRuns(GetWay& way, uint64_t max_bytes) {
  uint64_t posted = 0;
  while (!posted_all_ && posted < max_bytes && gets_.in_flight < kWindow &&
         gets_.failure == UCS_OK) {
    const auto run = runs_->Next(std::min(kMaxGetBytes, max_bytes - posted));
    if (!run.has_value()) {
      posted_all_ = true;
      break;
    }
    way.Get(run->src_region, run->src, {local_.regions[run->dst_region] + run->dst, run->bytes},
            *local_.memory[run->dst_region], &gets_);
    posted += run->bytes;
  }
  bytes_ += posted;
  if (!posted_all_ || gets_.in_flight > 0) return posted > 0 ? State::kBusy : State::kInFlight;
  // All data is here: only now the guard may be read again.
  std::atomic_thread_fence(std::memory_order_acquire);
  runs_.reset();
  GetGuard(way, portions_.last() ? Stage::kAfter : Stage::kBefore);
  return State::kBusy;
}

}  // namespace kvrelay::transport
