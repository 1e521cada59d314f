// One connection to another process's ZeroMQ carrier.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/status.h"
#include "base/wake_queue.h"
#include "transport/event_loop.h"
#include "transport/packed_carrier.h"
#include "transport/zmq_socket.h"

namespace kvrelay::transport {

class ZmqEndpoint;

// A message that ZeroMQ has been given. Its I/O thread pushes it into the carrier's queue when it
// reads the bytes no more.
struct ZmqSend {
  WakeQueue<std::unique_ptr<ZmqSend>>* freed = nullptr;  // outlives ZeroMQ's context
  ZmqEndpoint* endpoint = nullptr;
  PackedEndpoint::Sent sent;
};
using ZmqFreed = WakeQueue<std::unique_ptr<ZmqSend>>;

class ZmqEndpoint final : public PackedEndpoint {
 public:
  // Connects a PUSH socket. `loop` and `freed` outlive the endpoint.
  static Result<std::unique_ptr<ZmqEndpoint>> Create(std::shared_ptr<ZmqContext> context,
                                                     const ZmqSocketOptions& options,
                                                     const CurveIdentity& identity,
                                                     const KeyedEndpoint& peer, EventLoop& loop,
                                                     ZmqFreed& freed);
  ~ZmqEndpoint() override { Close(); }

  void Send(std::span<const std::byte> header, std::span<const std::byte> data, Sent sent) override;
  const Status& failure() const override { return failure_; }
  void Close() override;
  bool closing() const override { return !socket_.has_value(); }
  bool finished() const override { return closing() && in_flight_ == 0; }

  // By the carrier: a message came back from ZeroMQ.
  void OnFreed(ZmqSend& send);

 private:
  ZmqEndpoint(ZmqSocket socket, ZmqMonitor monitor, EventLoop& loop, ZmqFreed& freed)
      : loop_(loop), freed_(freed), socket_(std::move(socket)), monitor_(std::move(monitor)) {}
  void OnEvents();

  EventLoop& loop_;
  ZmqFreed& freed_;
  std::optional<ZmqSocket> socket_;  // until Close
  std::optional<ZmqMonitor> monitor_;
  Status failure_;
  uint32_t in_flight_ = 0;
};

}  // namespace kvrelay::transport
