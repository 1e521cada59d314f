#include "transport/mapped_read.h"

#include <string>
#include <utility>

namespace kvrelay::transport {
namespace {

// About a millisecond on one core at 4 KiB blocks.
constexpr uint64_t kStepBytes = 8 << 20;

}  // namespace

Status MappedRead::Check(const CopyPlan& plan, const GuardRef& guard,
                         std::span<const uint64_t> peer_region_bytes,
                         std::span<const uint64_t> local_region_bytes) {
  if (guard.region >= peer_region_bytes.size() || guard.offset % alignof(LeaseRecord) != 0 ||
      peer_region_bytes[guard.region] < sizeof(LeaseRecord) ||
      guard.offset > peer_region_bytes[guard.region] - sizeof(LeaseRecord)) {
    return Error(Code::kInvalidArgument, "the guard at offset " + std::to_string(guard.offset) +
                                             " of region " + std::to_string(guard.region) +
                                             " is not a record of the peer's " +
                                             std::to_string(peer_region_bytes.size()) + " regions");
  }
  return plan.Validate(peer_region_bytes, local_region_bytes);
}

MappedRead::MappedRead(CopyPlan plan, GuardRef guard) : guard_(guard), cursor_(std::move(plan)) {}

bool MappedRead::Step(std::span<const std::byte* const> peer_regions,
                      std::span<std::byte* const> local_regions) {
  const auto* record =
      reinterpret_cast<const LeaseRecord*>(peer_regions[guard_.region] + guard_.offset);
  if (!started_) before_ = record->ReadBefore();
  started_ = true;
  if (!cursor_.done()) bytes_ += cursor_.Step(kStepBytes, peer_regions, local_regions);
  if (!cursor_.done()) return false;
  after_ = record->ReadAfter();
  return true;
}

}  // namespace kvrelay::transport
