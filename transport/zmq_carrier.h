// Packed streams over ZeroMQ with CURVE: secret, and with an allowlist only from and to processes
// that hold an allowed key.
//
// A process receives on a PULL socket; each connection to another is a PUSH socket of its own, so
// one broken connection is one failed lane. ZeroMQ's I/O thread encrypts, decrypts and does the
// networking, one per carrier.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "transport/curve.h"
#include "transport/packed_carrier.h"

namespace kvrelay::transport {

// `interface`: where it listens and what data crosses; empty: loopback. `message_bytes`: of the
// largest message's data. `identity`: null for a key pair of this carrier alone, with which anybody
// may connect. Refuses with a reason when this host cannot do it.
Result<std::unique_ptr<PackedCarrier>> CreateZmqCarrier(
    const std::string& interface, uint64_t message_bytes,
    std::shared_ptr<const CurveIdentity> identity);

}  // namespace kvrelay::transport
