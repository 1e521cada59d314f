#include "transport/mapped_memory.h"

#include <string>
#include <utility>

namespace kvrelay::transport {
namespace {

Status MapRegion(AnnouncedRegion region, Device* device, MappedMemory& memory) {
  switch (region.kind) {
    case DeviceKind::kCpu: {
      KVRELAY_ASSIGN_OR_RETURN(MappedRegion mapped,
                               MappedRegion::Map(std::move(region.fd), region.bytes));
      memory.bases.push_back(mapped.data());
      memory.host.push_back(std::move(mapped));
      break;
    }
    case DeviceKind::kCuda: {
      if (device == nullptr) {
        return {Code::kIncompatible, "it is a GPU's memory, ours is the host's"};
      }
      KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<DeviceMapping> mapped,
                               device->Map(std::move(region.fd), region.bytes));
      memory.bases.push_back(mapped->data());
      memory.device.push_back(std::move(mapped));
      break;
    }
    default:
      return {Code::kIncompatible, "memory of a kind that we do not know"};
  }
  memory.bytes.push_back(region.bytes);
  return {};
}

Status PinRegions(Device& device, MappedMemory& memory) {
  for (size_t id = 0; id < memory.host.size(); ++id) {
    const MappedRegion& region = memory.host[id];
    const std::string which = "region " + std::to_string(id) + " is the host's memory";
    if (!region.keeps_pages()) {
      return {Code::kIncompatible, which + ", whose pages come and go"};
    }
    auto pinned = device.Pin({region.data(), region.bytes()}, HostAccess::kRead);
    if (!pinned.has_value()) return pinned.error().Wrap(which);
    memory.pinned.push_back(*std::move(pinned));
  }
  return {};
}

}  // namespace

Result<std::shared_ptr<MappedMemory>> MapRegions(std::vector<AnnouncedRegion> regions,
                                                 Device* device) {
  auto memory = std::make_shared<MappedMemory>();
  for (size_t id = 0; id < regions.size(); ++id) {
    if (Status status = MapRegion(std::move(regions[id]), device, *memory); !status.ok()) {
      return Error(status.Wrap("region " + std::to_string(id)));
    }
  }
  // A device's KV comes with records in the host's memory, which only the host reads.
  if (device != nullptr && memory->device.empty()) {
    KVRELAY_RETURN_IF_ERROR(PinRegions(*device, *memory));
  }
  return memory;
}

}  // namespace kvrelay::transport
