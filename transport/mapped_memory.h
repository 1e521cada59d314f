// One owner's regions as `mapped` has them in this process.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "base/clock.h"
#include "base/unique_fd.h"
#include "kvcache/device.h"
#include "kvcache/lease_record.h"
#include "kvcache/region.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// For as long as anybody holds them. Pages are populated under its readers.
struct MappedMemory {
  std::vector<MappedRegion> host;
  std::vector<std::unique_ptr<PinnedHost>> pinned;  // of `host`, for our device; goes before it
  std::vector<std::unique_ptr<DeviceMapping>> device;
  std::vector<const std::byte*> bases;  // of all regions, by RegionId
  std::vector<uint64_t> bytes;
  mutable std::atomic<TimePoint> last_used = TimePoint();  // by a read that began

  // `guard` has passed CheckGuard.
  const LeaseRecord& record(const GuardRef& guard) const {
    return *reinterpret_cast<const LeaseRecord*>(bases[guard.region] + guard.offset);
  }
  uint64_t all_bytes() const { return std::accumulate(bytes.begin(), bytes.end(), uint64_t{0}); }
};

// A region as its owner's socket hands it over.
struct AnnouncedRegion {
  UniqueFd fd;
  uint64_t bytes = 0;
  DeviceKind kind = DeviceKind::kCpu;
};

// For the host to read, or, with a device, for that: it outlives the memory. The error names the
// region: kIncompatible where we cannot reach it.
Result<std::shared_ptr<MappedMemory>> MapRegions(std::vector<AnnouncedRegion> regions,
                                                 Device* device);

}  // namespace kvrelay::transport
