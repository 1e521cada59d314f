// Memory in which chunks lie: an owner packs them there before they are sent, a reader's device
// unpacks them from there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/mapping.h"
#include "base/status.h"
#include "kvcache/device.h"
#include "transport/packed_wire.h"

namespace kvrelay::transport {

// One message that is being made, is on its way, or is being unpacked: nobody else touches it.
struct Slot {
  PackedHeader header;
  std::span<std::byte> data;
};

// One thread.
class SlotRing {
 public:
  // `device`: that reaches the slots' data, outlives the ring; null: none need to.
  static Result<std::unique_ptr<SlotRing>> Create(size_t slots, uint64_t slot_bytes,
                                                  Device* device = nullptr);

  // Null when all are in use.
  Slot* Take();
  void Give(Slot* slot) { free_.push_back(slot); }
  size_t free() const { return free_.size(); }
  size_t size() const { return slots_.size(); }
  uint64_t slot_bytes() const { return slot_bytes_; }

 private:
  SlotRing(Mapping memory, size_t slots, uint64_t slot_bytes);

  const Mapping memory_;
  std::unique_ptr<PinnedHost> pinned_;  // goes before the memory
  const uint64_t slot_bytes_;
  std::vector<Slot> slots_;
  std::vector<Slot*> free_;
};

}  // namespace kvrelay::transport
