// One optimistic read of a peer's mapped memory: guard words, data by plan, guard words again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/status.h"
#include "kvcache/copy_plan.h"
#include "kvcache/lease_record.h"
#include "transport/plan_cursor.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// One thread at a time. Whether the guard words hold is for the caller of the transport to judge.
class MappedRead {
 public:
  // kInvalidArgument when the plan or the guard leaves the regions, or the guard is not aligned.
  static Status Check(const CopyPlan& plan, const GuardRef& guard,
                      std::span<const uint64_t> peer_region_bytes,
                      std::span<const uint64_t> local_region_bytes);

  // Both have passed Check.
  MappedRead(CopyPlan plan, GuardRef guard);

  // Copies a part of some megabytes, the guard words before the first and after the last. True when
  // all is done.
  bool Step(std::span<const std::byte* const> peer_regions,
            std::span<std::byte* const> local_regions);

  const GuardWords& before() const { return before_; }
  const GuardWords& after() const { return after_; }
  uint64_t bytes() const { return bytes_; }

 private:
  const GuardRef guard_;
  PlanCursor cursor_;
  bool started_ = false;
  GuardWords before_;
  GuardWords after_;
  uint64_t bytes_ = 0;
};

}  // namespace kvrelay::transport
