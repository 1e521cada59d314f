#include "transport/mapper.h"

#include <utility>

namespace kvrelay::transport {

Result<std::unique_ptr<Mapper>> Mapper::Create(TransferThread& transfer, Device* device) {
  std::unique_ptr<Mapper> mapper(new Mapper(transfer, device));
  if (device != nullptr) {
    KVRELAY_ASSIGN_OR_RETURN(mapper->thread_, TransferThread::Create("kvr-mapper", Duration(0)));
    mapper->thread_->Start(mapper->nothing_);
  }
  return mapper;
}

void Mapper::Map(std::vector<AnnouncedRegion> regions, Mapped mapped) {
  if (thread_ == nullptr) return mapped(MapRegions(std::move(regions), nullptr));
  // Tasks are copied; descriptors are not.
  auto announced = std::make_shared<std::vector<AnnouncedRegion>>(std::move(regions));
  thread_->Post([this, announced, mapped = std::move(mapped)] {
    transfer_.Post(
        [mapped, memory = MapRegions(std::move(*announced), device_)] { mapped(memory); });
  });
}

void Mapper::Drop(std::shared_ptr<const MappedMemory> memory) {
  if (thread_ != nullptr && memory != nullptr) thread_->Post([memory = std::move(memory)] {});
}

}  // namespace kvrelay::transport
