// What is around every body on the control plane: one msgpack map
//   {"v": [major, minor], "t": "CLAIM", "id": 7, "more": false, "timeout_ms": 2000, "b": <body>}
// Body structs are codec.h's.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <tl/expected.hpp>

#include "base/status.h"
#include "proto/messages.h"

namespace kvrelay::proto {

// Peers of one major version understand each other; a minor version only adds what old peers may
// ignore.
inline constexpr uint32_t kVersionMajor = 1;
inline constexpr uint32_t kVersionMinor = 0;
std::string VersionText();  // "1.0"

struct Envelope {
  Type type = Type::kError;
  uint64_t id =
      0;  // chosen by the caller, > 0, unique among its calls in flight; replies repeat it
  bool more = false;        // replies: further ones follow
  uint32_t timeout_ms = 0;  // requests: what is left of the caller's deadline, on the receiver's
                            // clock from now; replies: 0
  std::string_view body;    // not owned
};

// The body is copied into the result.
std::string EncodeEnvelope(const Envelope& envelope);

// Why an envelope was not understood, with what its sender can still be told.
struct BadEnvelope {
  Status status;            // kIncompatible names both versions; else kInvalidArgument, kTooLarge
  std::string_view reason;  // for counters: "malformed", "version", "type", "size"
  uint64_t id = 0;          // of the call to answer; 0 when not even that could be read
};

// `bytes` from anybody; the body points into them. "v" and "id" keep their places in every major
// version, so that each can refuse the others.
tl::expected<Envelope, BadEnvelope> DecodeEnvelope(std::string_view bytes);

}  // namespace kvrelay::proto
