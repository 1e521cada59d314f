// One optimistic read of a peer's mapped memory: guard words, data, and so on, guard words again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "base/clock.h"
#include "base/status.h"
#include "kvcache/copy_plan.h"
#include "kvcache/device.h"
#include "kvcache/lease_record.h"
#include "transport/mapped_memory.h"
#include "transport/plan_cursor.h"
#include "transport/portions.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// One thread at a time. Whether the guard words hold is for the caller of the transport to judge.
//
// While no device copies: Prepare, and when it says kReady, Move.
class MappedRead {
 public:
  // Both sides' memory, by RegionId.
  struct Memory {
    std::shared_ptr<const MappedMemory> peer;
    std::span<std::byte* const> local;
    std::span<const uint64_t> local_bytes;
    Device* device = nullptr;  // of both sides' KV; null: the host's
  };
  enum class State : uint8_t { kReady, kWaiting, kDone, kFailed };
  // What takes about a millisecond on one core at 4 KiB blocks.
  static constexpr uint64_t kStepBytes = 8 << 20;

  // `guard` has passed CheckGuard.
  MappedRead(NextPortion next, GuardRef guard) : guard_(guard), portions_(std::move(next)) {}

  // kWaiting: there is nothing to read before poll_at(). kFailed: see failure(); a portion leaves
  // the regions (kInvalidArgument), there is to be none, or the device failed.
  State Prepare(const Memory& memory, TimePoint now);
  // What the next piece moves at most: `most`, or all of a portion where a device moves it.
  uint64_t PieceBytes(const Memory& memory, uint64_t most) const;
  // Moves up to `most`, but at least one run or a part of a long one; or has the device begin with
  // the portion. Returns the bytes that were moved.
  uint64_t Move(const Memory& memory, uint64_t most);

  // Of the piece that a device has in work. It holds the peer's memory as long; this object's end
  // waits for it.
  uint64_t copying_bytes() const { return copy_ == nullptr ? 0 : copying_bytes_; }
  // True when the device is done with it, well or badly.
  bool LookAtCopy();

  TimePoint poll_at() const { return portions_.poll_at(); }
  const Status& failure() const { return failure_; }
  const GuardWords& before() const { return portions_.before(); }
  const GuardWords& after() const { return after_; }
  uint64_t bytes() const { return bytes_; }

 private:
  const GuardRef guard_;
  Portions portions_;
  std::optional<PlanCursor> cursor_;  // of the portion in work
  std::shared_ptr<const MappedMemory> held_;
  std::unique_ptr<DeviceCopy> copy_;  // goes before what it reads
  uint64_t copying_bytes_ = 0;
  Status failure_;
  GuardWords after_;
  uint64_t bytes_ = 0;
};

}  // namespace kvrelay::transport
