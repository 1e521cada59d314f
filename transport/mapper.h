// Where peers' memory is mapped and unmapped.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "base/status.h"
#include "kvcache/device.h"
#include "transport/mapped_memory.h"
#include "transport/transfer_thread.h"

namespace kvrelay::transport {

// Without a device in the calls themselves: the host maps in microseconds. With one on a thread of
// its own, because that takes up to 55 ms a GiB, and no other peer's pull waits for it.
//
// Calls from the transfer thread, the destructor after that one's end: what was given to it is
// unmapped then.
class Mapper {
 public:
  using Mapped = std::function<void(Result<std::shared_ptr<MappedMemory>>)>;

  // `transfer` outlives the mapper; so does `device`, which may be null.
  static Result<std::unique_ptr<Mapper>> Create(TransferThread& transfer, Device* device);

  // `mapped` once, on the transfer thread, perhaps inside the call; not after that thread's end.
  void Map(std::vector<AnnouncedRegion> regions, Mapped mapped);
  // Lets go of it.
  void Drop(std::shared_ptr<const MappedMemory> memory);

 private:
  struct Nothing final : TransferThread::Worker {
    TimePoint Work(TimePoint) override { return TimePoint::max(); }
    void Finish() override {}
  };

  Mapper(TransferThread& transfer, Device* device) : transfer_(transfer), device_(device) {}

  TransferThread& transfer_;
  Device* const device_;
  Nothing nothing_;
  std::unique_ptr<TransferThread> thread_;  // null without a device
};

}  // namespace kvrelay::transport
