// One optimistic read of a peer's memory by one-sided operations: guard words, data, and so on,
// guard words again.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "base/clock.h"
#include "base/status.h"
#include "transport/get_way.h"
#include "transport/plan_runs.h"
#include "transport/portions.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// Transfer thread only. Stays where it is while anything is in flight. Whether the guard words hold
// is for the caller of the transport to judge.
class GetRead {
 public:
  // Operations in flight at most, and bytes of each: enough to keep a lane busy, few enough that a
  // cancelled read ends soon.
  static constexpr uint32_t kWindow = 32;
  static constexpr uint64_t kMaxGetBytes = 512 << 10;

  // Our side: the regions, their registrations, and 64 registered bytes for the guard words that
  // nobody else uses while the read lives.
  struct Local {
    std::span<std::byte* const> regions;
    std::span<const uint64_t> region_bytes;
    std::span<const std::unique_ptr<UcxMemory>> memory;
    std::byte* guard = nullptr;
    const UcxMemory* guard_memory = nullptr;
  };
  enum class State : uint8_t { kBusy, kInFlight, kWaiting, kDone, kFailed };

  // `guard` lies inside its region, aligned.
  GetRead(NextPortion next, GuardRef guard, Local local)
      : guard_(guard), portions_(std::move(next)), local_(local) {}

  // Posts what there is room for, of data at most `max_bytes`. kBusy: it did.
  // kInFlight: nothing to do until an operation ends, or more may be posted. kWaiting: there is
  // nothing to read before poll_at(). kFailed: see failure(); operations may still be in flight.
  State Step(GetWay& way, TimePoint now, uint64_t max_bytes);

  const UcxGets& gets() const { return gets_; }
  // There is data that may be read and was not posted.
  bool has_more() const { return stage_ == Stage::kData && !posted_all_; }
  TimePoint poll_at() const { return portions_.poll_at(); }
  const Status& failure() const { return failure_; }
  const GuardWords& before() const { return portions_.before(); }
  const GuardWords& after() const { return after_; }
  uint64_t bytes() const { return bytes_; }  // whose operations were posted

 private:
  enum class Stage : uint8_t { kStart, kBefore, kData, kPause, kAfter };

  void GetGuard(GetWay& way, Stage stage);
  GuardWords TakeGuard() const;
  // What the guard words just read allow.
  State BeginPortion(GetWay& way, TimePoint now, uint64_t max_bytes);
  State PostRuns(GetWay& way, uint64_t max_bytes);

  const GuardRef guard_;
  Portions portions_;
  const Local local_;
  Stage stage_ = Stage::kStart;
  UcxGets gets_;
  std::optional<PlanRuns> runs_;  // of the portion in work
  bool posted_all_ = false;       // of it
  Status failure_;
  GuardWords after_;
  uint64_t bytes_ = 0;
};

}  // namespace kvrelay::transport
