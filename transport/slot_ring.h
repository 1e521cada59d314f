// Memory in which an owner packs chunks before they are sent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/mapping.h"
#include "base/status.h"
#include "transport/packed_wire.h"

namespace kvrelay::transport {

// One message that is being made or is on its way: nobody touches it until its send has completed.
struct Slot {
  PackedHeader header;
  std::span<std::byte> data;
};

// One thread.
class SlotRing {
 public:
  static Result<std::unique_ptr<SlotRing>> Create(size_t slots, uint64_t slot_bytes);

  // Null when all are in use.
  Slot* Take();
  void Give(Slot* slot) { free_.push_back(slot); }
  size_t free() const { return free_.size(); }
  size_t size() const { return slots_.size(); }
  uint64_t slot_bytes() const { return slot_bytes_; }

 private:
  SlotRing(Mapping memory, size_t slots, uint64_t slot_bytes);

  const Mapping memory_;
  const uint64_t slot_bytes_;
  std::vector<Slot> slots_;
  std::vector<Slot*> free_;
};

}  // namespace kvrelay::transport
