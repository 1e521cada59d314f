#include "transport/slot_ring.h"

#include <sys/mman.h>

#include <utility>

namespace kvrelay::transport {

Result<std::unique_ptr<SlotRing>> SlotRing::Create(size_t slots, uint64_t slot_bytes,
                                                   Device* device) {
  KVRELAY_ASSIGN_OR_RETURN(Mapping memory, Mapping::Map(slots * slot_bytes, PROT_READ | PROT_WRITE,
                                                        MAP_PRIVATE | MAP_ANONYMOUS, -1));
  std::unique_ptr<SlotRing> ring(new SlotRing(std::move(memory), slots, slot_bytes));
  if (device != nullptr) {
    KVRELAY_ASSIGN_OR_RETURN(
        ring->pinned_,
        device->Pin({ring->memory_.data(), ring->memory_.bytes()}, HostAccess::kReadWrite));
  }
  return ring;
}

SlotRing::SlotRing(Mapping memory, size_t slots, uint64_t slot_bytes)
    : memory_(std::move(memory)), slot_bytes_(slot_bytes), slots_(slots) {
  for (size_t i = 0; i < slots; ++i) {
    slots_[i].data = {memory_.data() + i * slot_bytes, slot_bytes};
    free_.push_back(&slots_[i]);
  }
}

Slot* SlotRing::Take() {
  if (free_.empty()) return nullptr;
  // The one used last: its memory is still in the cache.
  Slot* slot = free_.back();
  free_.pop_back();
  return slot;
}

}  // namespace kvrelay::transport
