// Who may connect to the CURVE servers of a ZeroMQ context (ZAP, ZeroMQ's RFC 27).
#pragma once

#include <cstddef>
#include <memory>

#include "base/status.h"
#include "transport/curve.h"
#include "transport/zmq_socket.h"

namespace kvrelay::transport {

// One per context, made before its servers are bound. One thread, which serves it: clients wait in
// their handshake meanwhile, and are refused at its end.
class ZapHandler {
 public:
  static Result<ZapHandler> Create(std::shared_ptr<ZmqContext> context,
                                   std::shared_ptr<const CurveIdentity> identity);

  // Answers whoever waits; returns how many of them were refused.
  size_t Serve();
  const ZmqSocket& socket() const { return socket_; }

 private:
  ZapHandler(ZmqSocket socket, std::shared_ptr<const CurveIdentity> identity)
      : socket_(std::move(socket)), identity_(std::move(identity)) {}

  ZmqSocket socket_;
  std::shared_ptr<const CurveIdentity> identity_;
};

}  // namespace kvrelay::transport
