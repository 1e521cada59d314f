// Packing and unpacking of a stream's chunks: by the device that has the KV, or, where that is the
// host's, here and now.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/status.h"
#include "kvcache/copy_host.h"
#include "kvcache/copy_plan.h"
#include "kvcache/device.h"

namespace kvrelay::transport {

// What a device has in work; null: it is done. The plan is validated. `whole_bytes`: as for
// ExecuteCopy.
inline Result<std::unique_ptr<DeviceCopy>> BeginChunkCopy(
    Device* device, const CopyPlan& plan, std::span<const std::byte* const> src_regions,
    std::span<std::byte* const> dst_regions, uint64_t whole_bytes) {
  if (device != nullptr) return device->Copy(plan, src_regions, dst_regions);
  ExecuteCopy(plan, src_regions, dst_regions, whole_bytes);
  return std::unique_ptr<DeviceCopy>();
}

}  // namespace kvrelay::transport
