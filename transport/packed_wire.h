// What crosses the network in a packed stream: messages of one fixed header and some data, and the
// text by which a process says where its messages go.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/ids.h"
#include "base/status.h"
#include "kvcache/lease_record.h"

namespace kvrelay::transport {

enum class PackedKind : uint16_t {
  kChunk = 1,    // data: one chunk of a stream
  kStopped = 2,  // no data: the owner ends the stream before its last chunk; `code` says why
  kPing = 3,     // data: the sender's address; `stream` is a nonce
  kPong = 4,     // no data: the way that a ping came from works in both directions
};

// Little-endian, as all hosts that we build for are.
struct PackedHeader {
  uint64_t magic = 0;
  uint16_t version = 0;
  PackedKind kind = PackedKind::kChunk;
  uint32_t code = 0;       // Code; kStopped only
  uint64_t stream = 0;     // chosen by the reader
  uint32_t chunk = 0;      // counts from 0
  uint32_t chunks = 0;     // of the whole stream
  uint64_t bytes = 0;      // of data
  Incarnation sender = 0;  // of the process that sends
  GuardWords before;       // read before this chunk was packed, and after
  GuardWords after;
  uint64_t checksum = 0;  // of everything before it: garbage is not mistaken for a message
};
static_assert(sizeof(PackedHeader) == 120);

// Fills in magic, version and checksum.
void Seal(PackedHeader& header);
// kInvalidArgument unless `header` is one that Seal made and `data_bytes` is what it says.
Result<PackedHeader> CheckHeader(std::span<const std::byte> bytes, uint64_t data_bytes);

// Where a process receives: made by LocalAddress() of a packed transport.
struct PackedAddress {
  static constexpr size_t kMaxWorkerBytes = 4096;

  std::string library;  // "ucx 1.22.0", for messages
  Incarnation incarnation = 0;
  std::string worker;  // as the library made it; any bytes

  std::string Encode() const;
  // kInvalidArgument for anything that Encode does not make.
  static Result<PackedAddress> Decode(std::string_view bytes);
};

}  // namespace kvrelay::transport
