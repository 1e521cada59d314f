// One optimistic read of a peer's mapped memory: guard words, data, and so on, guard words again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>

#include "base/clock.h"
#include "base/status.h"
#include "kvcache/copy_plan.h"
#include "kvcache/lease_record.h"
#include "transport/plan_cursor.h"
#include "transport/portions.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// One thread at a time. Whether the guard words hold is for the caller of the transport to judge.
class MappedRead {
 public:
  // Both sides' memory: where regions begin and how long they are, by RegionId.
  struct Memory {
    std::span<const std::byte* const> peer;
    std::span<const uint64_t> peer_bytes;
    std::span<std::byte* const> local;
    std::span<const uint64_t> local_bytes;
  };
  enum class State : uint8_t { kBusy, kWaiting, kDone, kFailed };
  // What takes about a millisecond on one core at 4 KiB blocks.
  static constexpr uint64_t kStepBytes = 8 << 20;

  // `guard` has passed CheckGuard.
  MappedRead(NextPortion next, GuardRef guard) : guard_(guard), portions_(std::move(next)) {}

  // Copies up to `max_bytes`, but at least one run or a piece of a long one. kWaiting: there is
  // nothing to read before poll_at(). kFailed: see failure(); a portion leaves the regions
  // (kInvalidArgument), or there is to be none.
  State Step(const Memory& memory, TimePoint now, uint64_t max_bytes);

  TimePoint poll_at() const { return portions_.poll_at(); }
  const Status& failure() const { return failure_; }
  const GuardWords& before() const { return portions_.before(); }
  const GuardWords& after() const { return after_; }
  uint64_t bytes() const { return bytes_; }

 private:
  const GuardRef guard_;
  Portions portions_;
  std::optional<PlanCursor> cursor_;  // of the portion in work
  Status failure_;
  GuardWords after_;
  uint64_t bytes_ = 0;
};

}  // namespace kvrelay::transport
