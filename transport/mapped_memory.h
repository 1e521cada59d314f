// One owner's regions as `mapped` has them in this process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

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

  // `guard` has passed CheckGuard.
  const LeaseRecord& record(const GuardRef& guard) const {
    return *reinterpret_cast<const LeaseRecord*>(bases[guard.region] + guard.offset);
  }
};

}  // namespace kvrelay::transport
