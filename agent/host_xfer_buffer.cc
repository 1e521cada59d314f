#include "agent/host_xfer_buffer.h"

#include <string>
#include <utility>

namespace kvrelay::agent {

Result<std::unique_ptr<HostXferBuffer>> HostXferBuffer::Initialize(
    std::vector<DeviceCache> caches) {
  std::unique_ptr<HostXferBuffer> buffer(new HostXferBuffer);
  for (DeviceCache& device : caches) {
    const std::string rank = "rank " + std::to_string(buffer->caches_.size());
    KVRELAY_RETURN_IF_ERROR(device.layout.Validate(device.region_bytes).Wrap(rank));
    if (device.layout.num_kinds() > 1) {
      return Error(Code::kInvalidArgument,
                   rank + ": " + std::to_string(device.layout.num_kinds()) +
                       " kinds of layers, and copy functions are told one table of blocks");
    }
    RankCache cache{std::move(device.layout), device.shard, {}};
    for (const uint64_t bytes : device.region_bytes) {
      KVRELAY_ASSIGN_OR_RETURN(Region region, Region::AllocateHost(bytes, "kvrelay-host-xfer"));
      buffer->regions_.push_back(std::make_unique<Region>(std::move(region)));
      cache.regions.push_back(buffer->regions_.back().get());
    }
    buffer->caches_.push_back(std::move(cache));
  }
  return buffer;
}

Status HostXferBuffer::Copy(const CopyBlocks& op, std::span<const BlockId> blocks) const {
  if (!op) return Error(Code::kInvalidArgument, "the host buffer has no copy functions");
  if (blocks.empty()) return {};
  for (uint32_t rank = 0; rank < caches_.size(); ++rank) {
    HostXferRank host{.rank = rank, .layout = caches_[rank].layout, .regions = {}};
    for (const Region* region : caches_[rank].regions) host.regions.push_back(region->data());
    KVRELAY_RETURN_IF_ERROR(op(host, blocks).Wrap("rank " + std::to_string(rank)));
  }
  return {};
}

}  // namespace kvrelay::agent
