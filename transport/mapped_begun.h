// A read of a peer's mapped memory that a device carries out and its caller looks after.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "kvcache/device.h"
#include "transport/mapped_memory.h"
#include "transport/transport.h"

namespace kvrelay::transport {

class MappedBegun final : public BegunRead {
 public:
  // `plan` and `guard` were checked against `peer` and the local regions. Null when the guard is
  // not as wanted, or the device refuses.
  static std::unique_ptr<BegunRead> Begin(std::shared_ptr<Device> device,
                                          std::shared_ptr<const MappedMemory> peer,
                                          const CopyPlan& plan, std::span<std::byte* const> local,
                                          const GuardRef& guard, const GuardExpectation& want);

  std::optional<Completion> Look() override;

 private:
  MappedBegun(std::shared_ptr<Device> device, std::shared_ptr<const MappedMemory> peer,
              const LeaseRecord& record)
      : device_(std::move(device)), peer_(std::move(peer)), record_(record) {}

  // Each goes before what it needs.
  const std::shared_ptr<Device> device_;
  const std::shared_ptr<const MappedMemory> peer_;
  const LeaseRecord& record_;
  Completion completion_;
  std::unique_ptr<DeviceCopy> copy_;
};

}  // namespace kvrelay::transport
