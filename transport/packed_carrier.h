// What a packed stream rides on: a library that brings messages of one header and some data to
// other processes. Everything above it (streams, slots, pings, deadlines) is the same over all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/status.h"
#include "transport/event_loop.h"
#include "transport/packed_wire.h"

namespace kvrelay::transport {

// One connection to another process. The thread that progresses the carrier. Open -> failed (by the
// peer's death) or not -> closing -> finished: destroy it only then, or after its carrier.
class PackedEndpoint {
 public:
  // `sent` is called once, perhaps inside Send: neither header nor data is read any more. Not a
  // proof of delivery.
  using Sent = std::function<void(Status)>;

  virtual ~PackedEndpoint() = default;
  // Header and data stay as they are until `sent` is called. In order. Not after Close.
  virtual void Send(std::span<const std::byte> header, std::span<const std::byte> data,
                    Sent sent) = 0;
  // The peer's process or the way to it is gone; ok before.
  virtual const Status& failure() const = 0;
  // Begins a forced close: what is in flight is given up.
  virtual void Close() = 0;
  virtual bool closing() const = 0;
  // Closed, every `sent` was called, and no memory of ours is touched any more.
  virtual bool finished() const = 0;
};

// Created on the control thread; from Start on the transfer thread's alone, which destroys it.
class PackedCarrier {
 public:
  // `data` is valid during the call only. Called from Progress. A peer's messages come in the order
  // in which they were sent.
  using OnMessage =
      std::function<void(std::span<const std::byte> header, std::span<const std::byte> data)>;
  // Something came that nobody of ours sends. It was dropped.
  using OnForeign = std::function<void()>;

  virtual ~PackedCarrier() = default;
  virtual std::string_view name() const = 0;  // of the transport: "ucx-packed"
  virtual std::string library() const = 0;    // as in PackedAddress
  virtual std::string where() const = 0;      // where it listens, for messages: "interface lo"
  virtual uint64_t max_bytes_per_peer() const = 0;  // of memory that a connection takes
  // Receives from here on, and returns the address where. The carrier watches on `loop`, which
  // outlives it, what its thread must wake for.
  virtual Result<std::string> Start(EventLoop& loop, OnMessage on_message,
                                    OnForeign on_foreign) = 0;
  // Only starts to connect. kInvalidArgument or kIncompatible for an address that is not one of
  // this library.
  virtual Result<std::unique_ptr<PackedEndpoint>> Connect(const PackedAddress& peer) = 0;
  // True when something happened.
  virtual bool Progress() = 0;
  // About to sleep: false when there is something to progress now.
  virtual bool PrepareToSleep() = 0;
};

}  // namespace kvrelay::transport
