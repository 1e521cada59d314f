// A copy plan in steps: a transfer thread copies some megabytes, looks around (cancelled? past the
// deadline? peer dead?), and goes on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "kvcache/copy_host.h"
#include "kvcache/copy_plan.h"

namespace kvrelay::transport {

class PlanCursor {
 public:
  // `plan` has passed Validate.
  explicit PlanCursor(CopyPlan plan) : plan_(std::move(plan)), bytes_(plan_.bytes()) {}

  const CopyPlan& plan() const { return plan_; }
  uint64_t bytes() const { return bytes_; }
  bool done() const { return position_ == bytes_; }
  // Another executes all of it.
  void Skip() { position_ = bytes_; }
  // Executes the next part of the plan, of at most `max_bytes` but at least one run or piece of a
  // long run, and returns the bytes copied. Every byte of the plan is copied once over all calls.
  uint64_t Step(uint64_t max_bytes, std::span<const std::byte* const> src_regions,
                std::span<std::byte* const> dst_regions) {
    const uint64_t begin = position_;
    position_ = ExecuteCopyPart(plan_, begin, max_bytes, src_regions, dst_regions);
    return position_ - begin;
  }

 private:
  CopyPlan plan_;
  uint64_t bytes_;
  uint64_t position_ = 0;
};

}  // namespace kvrelay::transport
