// Where a process's regions can be read one-sided, as its transport says it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "transport/mapped_address.h"
#include "transport/transport.h"

namespace kvrelay::transport {

struct GetAddress {
  static constexpr size_t kMaxRegions = 64;
  static constexpr size_t kMaxWorkerBytes = 2048;
  // Memory that peers may read: its place in the owner's address space and the library's key to it.
  struct Span {
    uint64_t base = 0;
    uint64_t bytes = 0;
    std::string key;
    bool operator==(const Span&) const = default;
  };

  std::string library;  // "ucx 1.22.0"
  HostIdentity host;
  Incarnation incarnation = 0;
  std::string worker;  // as the library made it; any bytes
  Span beacon;         // a Beacon: what a reader reads first
  std::vector<Span> regions;

  Address Encode() const;
  // kInvalidArgument for anything that Encode does not make.
  static Result<GetAddress> Decode(std::string_view bytes);
};

// What lies at the beacon: whoever reads it has reached the process that made the address.
struct Beacon {
  uint64_t magic = kMagic;
  Incarnation incarnation = 0;
  static constexpr uint64_t kMagic = 0x4e4f43414542564bULL;  // "KVBEACON"
};

}  // namespace kvrelay::transport
